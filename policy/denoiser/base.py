"""What a denoiser of action chunks offers to the policy, the sampling loop, the decoders and the export."""

from torch import nn


class Denoiser(nn.Module):
    """Predicts noise: actions (B, T, Da) at diffusion steps (B,), observations (B, K) -> (B, T, Da).

    A film is what a layer takes of step and observation. It is a sum of one part of the step and one of the
    observation. So the loop computes the parts of the steps once a model and that of the observation once a sample.
    ``denoise`` gets the sums as a list, in the order in which both methods make them.

    multiple: T must be a multiple of it. widths: the last one is C, the channels of the bottleneck (B, C, T / multiple)
    that state decoders read. A denoiser sets both and defines ``step_films``, ``observation_films`` and
    ``denoise_and_bottleneck``.
    """

    multiple = 1

    def step_films(self, steps):
        """steps (S,) -> the steps' part of every film, [(S, ...)]."""
        raise NotImplementedError

    def observation_films(self, condition):
        """condition (B, K) -> the observation's part of every film, [(B, ...)]."""
        raise NotImplementedError

    def denoise_and_bottleneck(self, actions, films):
        """actions (B, T, Da), films [(B, ...)] -> (B, T, Da) and the bottleneck (B, C, T / multiple)."""
        raise NotImplementedError

    def denoise(self, actions, films):
        """As ``denoise_and_bottleneck``, without the bottleneck."""
        return self.denoise_and_bottleneck(actions, films)[0]

    def films(self, steps, condition):
        """Films [(B * S, ...)] for steps (B, S), S of each condition (B, K)."""
        parts = zip(self.step_films(steps.flatten()), self.observation_films(condition), strict=True)
        return [(ours.unflatten(0, steps.shape) + theirs[:, None]).flatten(0, 1) for ours, theirs in parts]

    def forward(self, actions, steps, condition):
        """actions (B, T, Da), steps (B,), condition (B, K) -> noise (B, T, Da)."""
        return self.denoise(actions, self.films(steps[:, None], condition))
