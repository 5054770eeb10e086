"""The denoising loop of a diffusion policy, without work that does not depend on the step.

FiLM of the observation is computed once a sample and that of the steps once for the weights as they are; both are
exact, since a block's FiLM is a sum of the two. The numbers of the sampler are constants of the loop.
"""

import torch
from diffusers.utils.torch_utils import randn_tensor

from policy.kernels.unet1d import PackedUNet, unsupported


class DenoisingLoop:
    """Runs a denoiser (policy.denoiser.base) over sampling steps (policy.denoiser.samplers.Step).

    clip: clean actions are clipped to [-1, 1]. packed_weights: None, or how the CPU kernels for few rows hold the
    weights, "float32" or "bfloat16" (policy.kernels.unet1d). cuda_graph: capture the loop once for each batch size.
    """

    def __init__(self, *, clip):
        self.clip = clip
        self.packed_weights = "float32"
        self.cuda_graph = False
        self.clear()

    def clear(self):
        """Drop what was computed from the weights."""
        self._weights = self._packed = None
        self._tables, self._graphs = {}, {}

    def draw(self, shape, steps, *, generator, device):
        """Start (B, T, Da) and what the steps add (draws, B, T, Da), from one generator or one for each of B.

        The order of the draws is that of diffusers' schedulers.
        """
        first = generator[0] if isinstance(generator, list) else generator
        where = device if first is None else first.device
        count = 1 + sum(step.noise_weight > 0 for step in steps)
        drawn = [randn_tensor(shape, generator=generator, device=where, dtype=torch.float32) for _ in range(count)]
        drawn = torch.stack(drawn).to(device)
        return drawn[0], drawn[1:]

    def __call__(self, denoiser, condition, start, noise, steps):
        """condition (B, K), start (B, T, Da), noise (draws, B, T, Da) -> denoised (B, T, Da), normalised."""
        self._check_weights(denoiser)
        films = denoiser.observation_films(condition)
        key = (tuple(steps), torch.is_autocast_enabled(condition.device.type))
        if key not in self._tables:
            timesteps = torch.tensor([step.timestep for step in steps], device=condition.device)
            self._tables[key] = list(zip(*denoiser.step_films(timesteps), strict=True))  # [step][block] (2C,)
        tables = self._tables[key]
        if not (self.cuda_graph and condition.is_cuda):
            return self._run(self._fastest(denoiser, start, films), start, noise, films, tables, steps)
        key = (key, start.shape)
        if key not in self._graphs:
            self._graphs[key] = GraphedCall(
                lambda start, noise, *films: self._run(denoiser.denoise, start, noise, films, tables, steps),
                start,
                noise,
                *films,
            )
        return self._graphs[key](start, noise, *films)

    def _check_weights(self, denoiser):
        """Drop what was computed from other weights: training changes them in place, and so does loading."""
        if self._weights is None or not self._weights.are_those_of(denoiser):
            self.clear()
            self._weights = Weights(denoiser)

    def _fastest(self, denoiser, start, films):
        """The function (x, films) -> prediction that is fastest here for as many rows."""
        if self.packed_weights is None or unsupported(denoiser, start, films) is not None:
            return denoiser.denoise
        if self._packed is None or self._packed.weights != self.packed_weights:
            self._packed = PackedUNet(denoiser, weights=self.packed_weights)
        return self._packed.denoise

    def _run(self, denoise, x, noise, films, tables, steps):
        draws = iter(noise)
        last = None
        for step, table in zip(steps, tables, strict=True):
            predicted = denoise(x, [ours + row for ours, row in zip(films, table, strict=True)]).float()
            raw = step.keep * x + step.predict * predicted
            clean = raw.clamp(-1, 1) if self.clip else raw
            x = step.x_weight * x + step.clean_weight * clean
            if step.raw_weight:
                x = x + step.raw_weight * raw
            if step.last_weight:
                x = x + step.last_weight * last
            if step.noise_weight:
                x = x + step.noise_weight * next(draws)
            last = clean
        return x


class Weights:
    """The weights of a module as they are now, by torch's counters of changes, which fused optimizers do not keep."""

    def __init__(self, module):
        # Kept, so that neither a parameter nor its memory can be replaced by another one at the same address.
        self.state = [(p, p.detach(), p._version) for p in module.parameters()]

    def are_those_of(self, module):
        """Whether ``module`` has these parameters, in the same memory and unchanged since."""
        parameters = list(module.parameters())
        return len(parameters) == len(self.state) and all(
            now is then and now.data_ptr() == memory.data_ptr() and now._version == version
            for now, (then, memory, version) in zip(parameters, self.state, strict=True)
        )


class GraphedCall:
    """``function(*tensors)`` captured as a CUDA graph: one launch, whatever it launches itself."""

    def __init__(self, function, *inputs):
        self.inputs = [tensor.clone() for tensor in inputs]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries allocate their workspaces before the capture
            for _ in range(3):
                function(*self.inputs)
        torch.cuda.current_stream().wait_stream(stream)
        torch.clear_autocast_cache()  # copies of weights from outside the capture would be freed after it
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.output = function(*self.inputs)

    def __call__(self, *inputs):
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        self.graph.replay()
        return self.output.clone()
