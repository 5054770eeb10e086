"""The U-Net's CPU kernels against torch: float64, then exact properties (threads, tiles, copies)."""

import copy

import pytest
import torch
from torch.autograd import forward_ad

from policy.denoiser.unet1d import ConditionalUNet1D
from policy.kernels import unet1d as unet1d_cpu
from policy.kernels import unet1d_numba as unet1d_kernels
from policy.kernels.unet1d import PackedUNet, unsupported

pytestmark = pytest.mark.usefixtures("without_gradients")


@pytest.fixture
def without_gradients():
    with torch.no_grad():
        yield


def unet(*, seed=0, **options):
    torch.manual_seed(seed)
    defaults = {"action_dim": 2, "condition_dim": 7, "widths": [12, 20], "kernel_size": 3, "groups": 4, "step_dim": 8}
    model = ConditionalUNet1D(**{**defaults, **options}).eval()
    for parameter in model.parameters():  # normalisations too: they begin as ones and zeros
        parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def inputs(model, batch=1, horizon=8):
    """Actions (B, T, Da) and films, whose values differ from sample to sample."""
    generator = torch.Generator().manual_seed(batch)
    actions = torch.randn(batch, horizon, model.out[1].out_channels, generator=generator)
    sizes = [2 * block.first[0].out_channels for block in model.blocks()]
    return actions, [torch.randn(batch, size, generator=generator) for size in sizes]


def error(model, packed, actions, films):
    """Largest difference to torch in float64, as a fraction of the largest output."""
    exact = copy.deepcopy(model).double().denoise(actions.double(), [film.double() for film in films])
    out = packed.denoise(actions, films)
    assert out.shape == exact.shape and out.dtype == torch.float32
    return ((out - exact).abs().max() / exact.abs().max()).item()


@pytest.mark.parametrize(
    ("batch", "horizon", "options"),
    [
        (1, 8, {}),
        (3, 16, {"kernel_size": 7, "action_dim": 10}),
        (2, 32, {"kernel_size": 5, "action_dim": 1, "widths": [8, 16, 24]}),
        (4, 4, {"widths": [32, 16, 80], "groups": 8, "kernel_size": 5}),  # one step at the lowest level
        (1, 7, {"widths": [20], "kernel_size": 1}),
        (2, 29, {"widths": [16], "kernel_size": 9}),  # taps beyond both ends
        (1, 16, {"widths": [64, 128]}),
        (1, 8, {"action_dim": 12}),  # the first block has no convolution on its skip
        (2, 8, {"widths": [24, 12]}),  # nor has the one that takes two signals
        (1, 4, {"widths": [8, 336], "kernel_size": 3}),  # more channels than are added up at once
        (1, 16, {"widths": [40], "groups": 1}),
    ],
)
def test_denoise_equals_torch(batch, horizon, options):
    model = unet(**options)
    actions, films = inputs(model, batch, horizon)
    packed = PackedUNet(model)
    assert error(model, packed, actions, films) < 5e-6
    torch.testing.assert_close(packed.denoise(actions, films), model.denoise(actions, films), rtol=1e-4, atol=1e-5)


def test_one_packed_unet_takes_any_batch_and_horizon():
    model = unet(widths=[8, 12, 16])
    packed = PackedUNet(model)
    for batch, horizon in [(1, 8), (4, 8), (1, 16), (1, 8), (2, 12), (32, 16)]:
        actions, films = inputs(model, batch, horizon)
        assert error(model, packed, actions, films) < 5e-6
        assert error(model, packed, -actions, [-film for film in films]) < 5e-6  # nothing is left of the call before


def test_films_and_actions_need_not_be_contiguous():
    model = unet()
    actions, films = inputs(model, batch=2)
    apart = torch.stack([actions, actions], dim=-1)[..., 0], [torch.stack([f, f], dim=-1)[..., 0] for f in films]
    packed = PackedUNet(model)
    assert torch.equal(packed.denoise(*apart), packed.denoise(actions, films))


def test_bfloat16_rounds_the_weights_only():
    model = unet(widths=[64, 128])
    actions, films = inputs(model, horizon=16)
    rounded = copy.deepcopy(model)
    for module in rounded.modules():
        if isinstance(module, torch.nn.Conv1d | torch.nn.ConvTranspose1d):
            module.weight.copy_(module.weight.bfloat16())
    packed = PackedUNet(model, weights="bfloat16")
    assert error(rounded, packed, actions, films) < 5e-6
    assert 1e-4 < error(model, packed, actions, films) < 2e-2


def test_extreme_activations_stay_finite():
    """Mish of -1e4 is 0 and of 1e4 is 1e4: no exponential may overflow."""
    model = unet()
    for module in model.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.weight.mul_(1e4)
    assert error(model, PackedUNet(model), *inputs(model)) < 5e-6


@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
def test_threads_do_not_change_a_bit(weights):
    model = unet(widths=[128, 256], groups=8)  # large enough for the threads to meet
    packed, (actions, films) = PackedUNet(model, weights), inputs(model, 4, 32)
    before = torch.get_num_threads()
    try:
        outs = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            outs += [packed.denoise(actions, films) for _ in range(10)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(out, outs[0]) for out in outs)


def test_without_openmp_one_thread_does_it_all(monkeypatch):
    model = unet()
    packed, (actions, films) = PackedUNet(model), inputs(model)
    expected = packed.denoise(actions, films)
    monkeypatch.setattr(unet1d_cpu, "openmp", lambda: (None, 0))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert torch.equal(packed.denoise(actions, films), expected)


def test_processors_with_fewer_registers(monkeypatch):
    """Smaller tiles give the same sums in the same order."""
    model = unet(widths=[64, 128])
    actions, films = inputs(model, horizon=16)
    expected = PackedUNet(model).denoise(actions, films)
    for features, size in (({"avx512f": True}, (8, 2)), ({"avx512f": False}, (4, 1)), ({}, (4, 1))):
        monkeypatch.setattr(unet1d_kernels, "get_host_cpu_features", lambda features=features: features)
        assert unet1d_kernels.tile_size(8, 8) == size
        assert torch.equal(PackedUNet(model).denoise(actions, films), expected)


def test_tiles_fit_the_registers_and_the_work(monkeypatch):
    for wide, most in ((True, 24), (False, 4)):
        monkeypatch.setattr(unet1d_kernels, "get_host_cpu_features", lambda wide=wide: {"avx512f": wide})
        for steps in range(1, 65):
            for blocks in range(1, 9):
                rows, width = unet1d_kernels.tile_size(steps, blocks)
                assert steps % rows == 0 and blocks % width == 0 and rows * width <= most


def test_a_copy_packs_its_own_weights():
    model = unet()
    packed = PackedUNet(model, weights="bfloat16")
    other, twin = copy.deepcopy((model, packed))
    assert twin.unet is other and twin.weights == "bfloat16"
    assert torch.equal(twin.denoise(*inputs(model)), packed.denoise(*inputs(model)))


def test_packed_weights_are_a_copy():
    model = unet()
    actions, films = inputs(model)
    packed = PackedUNet(model)
    before = packed.denoise(actions, films)
    model.load_state_dict(unet(seed=1).state_dict())
    assert torch.equal(packed.denoise(actions, films), before)
    assert error(model, PackedUNet(model), actions, films) < 5e-6


def test_what_is_not_supported():
    model = unet().requires_grad_(False)
    actions, films = inputs(model)
    rows = unet1d_cpu.ROWS_LIMIT // 8
    assert unsupported(model, actions) is unsupported(model, torch.zeros(rows, 8, 2)) is None
    for key, other, given in (
        ("dtype", model, actions.double()),
        ("dtype", unet().bfloat16(), actions),
        ("device", model, actions.to("meta")),
        ("mode", unet().train(), actions),
        ("rows", model, torch.zeros(rows + 1, 8, 2)),
        ("denoiser", torch.nn.Linear(2, 2).eval(), actions),
    ):
        assert unsupported(other, given).startswith(key)
    with forward_ad.dual_level():
        assert unsupported(model, actions).startswith("transform")
    reasons = []
    torch.func.vmap(lambda x: reasons.append(unsupported(model, x)) or x)(actions)
    assert reasons[0].startswith("transform")
    with torch.enable_grad():
        assert unsupported(model, actions, films) is None
        assert unsupported(model, actions.clone().requires_grad_()).startswith("gradients")
        assert unsupported(model, actions, [films[0].clone().requires_grad_()]).startswith("gradients")
        model.out[1].bias.requires_grad_()
        assert unsupported(model, actions).startswith("gradients")


def test_wrong_shapes_are_refused():
    model = unet()
    packed, (actions, films) = PackedUNet(model), inputs(model)
    with pytest.raises(ValueError, match="weights"):
        PackedUNet(model, weights="int8")
    with pytest.raises(ValueError, match="horizon"):
        packed.denoise(actions[:, :7], films)
    with pytest.raises(ValueError, match="actions"):
        packed.denoise(actions[..., :1], films)
    for wrong in (films[:-1], [film[:, 1:] for film in films], [film.repeat(2, 1) for film in films]):
        with pytest.raises(ValueError, match="films"):
            packed.denoise(actions, wrong)
