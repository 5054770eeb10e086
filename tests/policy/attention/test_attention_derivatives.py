"""Derivatives beyond one backward pass, over every registered attention: right, or an error; never silently wrong.

torch's fused attention on a CPU has first derivatives alone; its plain form (``SDPBackend.MATH``) has all.
"""

import contextlib
import functools

import pytest
import torch
from attentions import DIM, build, every_attention, every_name, padding
from fibottention_reference import HEADS, tokens
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from policy.attention import fibottention

pytestmark = pytest.mark.filterwarnings(
    "ignore:Fibottention is evaluated densely", "ignore:There is a performance drop"
)
CLOSE = {"rtol": 2e-4, "atol": 2e-4}
each_kernel = pytest.mark.parametrize("math", [True, False], ids=["plain", "fused"])
each_mask = pytest.mark.parametrize("masked", [False, True], ids=["all", "padded"])


def pair(name, options, masked):
    """The attention in float32 and in float64 as functions of x (2, 17, C), a point and a direction in float64."""
    mask = padding([3, 15, 16], []) if masked else None
    exact, attention = build(name, options).double(), build(name, options)
    x, direction = torch.randn(2, 2, 17, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).unbind()

    def call(module):
        return lambda x: module(x, key_padding_mask=mask)

    return call(attention), call(exact), x, direction


def difference(function, x, direction, size=1e-5):
    return (function(x + size * direction) - function(x - size * direction)) / (2 * size)


def gradient(function, **options):
    """x -> the gradient of a sum of squares, by a backward pass."""

    def of(x):
        x = x if x.requires_grad else x.detach().requires_grad_()
        return torch.autograd.grad(function(x).square().sum(), x, **options)[0]

    return of


@contextlib.contextmanager
def right_or_refused(math):
    """Without the plain kernels an error of torch will do; a wrong number never does."""
    with sdpa_kernel(SDPBackend.MATH) if math else contextlib.nullcontext():
        try:
            yield
        except RuntimeError as error:  # NotImplementedError, too
            if math:
                raise
            assert "attention" in str(error)


def by_dual_numbers(function, x, direction):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, direction))).tangent


@every_attention
@each_mask
@each_kernel
def test_forward_derivatives(name, options, masked, math):
    attention, exact, x, direction = pair(name, options, masked)
    expected = difference(exact, x, direction)
    for function in (lambda *inputs: jvp(inputs[0], (inputs[1],), (inputs[2],))[1], by_dual_numbers):
        with right_or_refused(math):
            found = function(attention, x.float(), direction.float())
            torch.testing.assert_close(found.double(), expected, **CLOSE)


@every_attention
@each_mask
@each_kernel
def test_second_derivatives(name, options, masked, math):
    """Times a direction: forward over reverse in float32, reverse over reverse in float64."""
    attention, exact, x, direction = pair(name, options, masked)
    expected = difference(gradient(exact), x, direction)
    with right_or_refused(math):
        found = jvp(grad(lambda x: attention(x).square().sum()), (x.float(),), (direction.float(),))[1]
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)
    with right_or_refused(math):
        x = x.requires_grad_()
        first = gradient(exact, create_graph=True)(x)
        (found,) = torch.autograd.grad((first * direction).sum(), x)
        torch.testing.assert_close(found, expected, **CLOSE)


@every_attention
def test_gradients_of_each_sample(name, options):
    attention, x = build(name, options), torch.randn(3, 17, DIM)
    parameters = dict(attention.named_parameters())

    def loss(parameters, x):
        return functional_call(attention, parameters, (x[None],)).square().sum()

    torch.testing.assert_close(vmap(lambda x: attention(x[None])[0])(x), attention(x), **CLOSE)
    with right_or_refused(math=False):
        found = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
        for row in range(3):
            expected = torch.autograd.grad(loss(parameters, x[row]), list(parameters.values()))
            for ours, theirs in zip(found.values(), expected, strict=True):
                torch.testing.assert_close(ours[row], theirs, rtol=1e-3, atol=1e-3)


@every_name
def test_an_ensemble_by_vmap(name):
    members, x = [build(name, seed=seed) for seed in (1, 2)], torch.randn(2, 17, DIM)
    state = stack_module_state(members)
    found = vmap(lambda *state: functional_call(members[0], state, (x,)))(*state)
    torch.testing.assert_close(found, torch.stack([member(x) for member in members]), **CLOSE)


# Fibottention's kernels ------------------------------------------------------------------------------------------

TRANSFORMS = {
    "jvp": lambda f, x, t: jvp(f, (x,), (t,))[1],
    "dual numbers": by_dual_numbers,
    "jacfwd": lambda f, x, t: jacfwd(lambda x: f(x).sum())(x),
    "jacrev": lambda f, x, t: jacrev(lambda x: f(x).sum(dim=(0, 1, 3)))(x),
    "vjp": lambda f, x, t: vjp(f, x)[1](t)[0],
    "grad": lambda f, x, t: grad(lambda x: f(x).square().sum())(x),
    "vmap": lambda f, x, t: vmap(f)(torch.stack([x, t])),
    "hessian": lambda f, x, t: hessian(lambda s: f(s * x).square().sum())(torch.tensor(1.0)),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("wrt", [0, 1, 2], ids="qkv")
def test_transforms_of_the_kernels(transform, wrt):
    """With respect to one of q, k and v: "auto" is dense and says so, a named kernel refuses."""
    inputs = list(tokens(1, 4, 12, 8))
    x, direction = inputs.pop(wrt), inputs.pop()

    def attend(backend):
        def attend(x):
            return fibottention(*inputs[:wrt], x, *inputs[wrt:], HEADS, backend=backend)

        return TRANSFORMS[transform](attend, x, direction)

    torch.testing.assert_close(attend("auto"), attend("dense"), rtol=0, atol=0)
    with pytest.warns(UserWarning, match="evaluated densely.*transform"):
        attend("auto")
    with pytest.raises(ValueError, match="backend=dense"):
        attend("cpu")


def test_a_compiled_derivative():
    q, k, v, direction = tokens(1, 4, 12, 8)

    def derivative(q, direction):
        return jvp(lambda q: fibottention(q, k, v, HEADS), (q,), (direction,))[1]

    torch._dynamo.reset()
    compiled = torch.compile(derivative, backend="aot_eager")
    torch.testing.assert_close(compiled(q, direction), derivative(q, direction))


@pytest.mark.parametrize("backend", ["auto", "cpu"])
def test_derivatives_of_the_kernels_gradients_are_refused(backend):
    q, k, v, direction = (x.detach().requires_grad_() for x in tokens(1, 4, 12, 8))
    out = fibottention(q, k, v, HEADS, backend=backend)
    (first,) = torch.autograd.grad(out, q, direction, create_graph=True)
    for leaf in (q, v, direction):
        with pytest.raises(ValueError, match="backend=dense"):
            torch.autograd.grad(first.sum(), leaf, retain_graph=True)
    with pytest.raises(ValueError, match="backend=dense"):  # was a derivative of zero
        jvp(lambda g: torch.autograd.grad(out, q, g, retain_graph=True)[0], (direction,), (direction,))
    with pytest.raises(ValueError, match="backend=dense"), forward_ad.dual_level():
        torch.autograd.grad(out, q, forward_ad.make_dual(direction.detach(), direction.detach()))


def test_many_gradients_at_once_need_no_second_derivative():
    q, k, v, _ = tokens(1, 4, 12, 8)

    def jacobian(backend):
        attend = functools.partial(fibottention, k=k, v=v, offsets=HEADS, backend=backend)
        return torch.autograd.functional.jacobian(attend, q, vectorize=True)

    torch.testing.assert_close(jacobian("cpu"), jacobian("dense"))
