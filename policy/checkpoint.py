"""Checkpoints: one safetensors file each, whose header carries the configuration and the training state as JSON.

Written to a temporary file, flushed and renamed, so a killed process or a full disk leaves the previous one whole;
loading never executes code. A digest of every tensor and one of the texts tell a damaged file from a whole one.
"""

import hashlib
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from policy.build import assemble, outline
from policy.encoder.adapt import adapt_weights
from policy.encoder.observation import ObservationEncoder
from policy.files import whole
from policy.normalizer import Normalizer
from policy.registry import within
from policy.training.protocols import Policy

FORMAT = "fibottention-policy-1"
LAST = "last.safetensors"
TEXTS = ("format", "config", "state")
DIGESTS = ("digests", "digest")  # of each tensor, by name, as JSON; of all texts. Older files have none.
DIGITS = 16  # hexadecimal, of a tensor's sha256
DEEPEST = 64  # sections and lists in each other
SECTIONS = ("model", "encoder", "attention", "task", "training", "rollout")


def save_checkpoint(path, tensors, *, config, state):
    """Write ``tensors`` {name: tensor} with the JSON-able dicts ``config`` and ``state``, atomically.

    Raises OSError when the disk refuses; an older file at ``path`` then stays as it was.
    """
    path = Path(path)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"format": FORMAT, "config": json.dumps(config, allow_nan=False), "state": json.dumps(state)}
    metadata["digests"] = json.dumps(_digests(tensors))
    metadata["digest"] = _digest_of_texts(metadata)
    memory = set()
    for name, tensor in tensors.items():
        # safetensors refuses tensors that share memory (tied parameters, views), so all but the first are copied.
        if tensor.untyped_storage().data_ptr() in memory:
            tensors[name] = tensor.clone()
        memory.add(tensor.untyped_storage().data_ptr())
    try:
        with whole(path) as place:
            save_file(tensors, place, metadata=metadata)
            place.chmod(place.parent.stat().st_mode & 0o666)  # safetensors makes it readable by its owner alone
    except (OSError, SafetensorError) as error:
        raise OSError(f"checkpoint {path} was not written ({error}); the previous one is untouched") from error


def load_checkpoint(path, prefix=""):
    """(tensors whose names start with ``prefix``, without it; config; state) of a checkpoint file.

    All texts and the tensors that are read are compared with their digests. Raises FileNotFoundError, or ValueError for
    a file that is not one of ours or is damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: got {path}, which is not a file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"got format {metadata.get('format')!r}, allowed: {FORMAT!r}")
            config, state = (_read_json(key, metadata[key]) for key in ("config", "state"))
            names = list(file.keys())
            digests = _read_digests(metadata, names)
            tensors = {name: file.get_tensor(name) for name in names if name.startswith(prefix)}
        if digests is not None:
            found = _digests(tensors)
            damaged = [name for name in found if found[name] != digests[name]]
            if damaged:
                raise ValueError(f"got a damaged tensor {damaged[0]!r} ({len(damaged)} in all)")
        elif tensors:
            print(f"note: {path} is an older checkpoint, without digests: damage would not be seen", file=sys.stderr)
    except (SafetensorError, LookupError, TypeError, AttributeError, ValueError, RecursionError) as error:
        reason = f"{type(error).__name__} {error}" if not isinstance(error, ValueError | SafetensorError) else error
        raise ValueError(
            f"{path}: got a damaged or foreign file ({reason}), allowed: a checkpoint of this project"
        ) from error
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items()}, config, state


def _digests(tensors):
    """{name: start of the sha256 of name, type, shape and bytes}, on all cores."""

    def digest(name):
        tensor = tensors[name].contiguous()
        found = hashlib.sha256(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy())
        return found.hexdigest()[:DIGITS]

    with ThreadPoolExecutor() as pool:
        return dict(zip(tensors, pool.map(digest, tensors), strict=True))


def _digest_of_texts(metadata):
    return hashlib.sha256("\n".join(metadata[key] for key in (*TEXTS, "digests")).encode()).hexdigest()


def _read_digests(metadata, names):
    """{name: digest} of the tensors ``names``, None of an older file; ValueError where the texts are damaged."""
    if set(metadata) == set(TEXTS):
        return None
    if set(metadata) != {*TEXTS, *DIGESTS} or metadata["digest"] != _digest_of_texts(metadata):
        raise ValueError("got a damaged header")
    digests = json.loads(metadata["digests"])
    if set(digests) != set(names):
        raise ValueError("got other tensors than were written")
    return digests


def _read_json(key, text):
    """The dict that ``text`` is: no deep nesting, huge integer or key twice; of ``state``, its step is a count."""

    def unique(pairs):
        if len(dict(pairs)) < len(pairs):
            raise ValueError(f"{key}: got a key twice")
        return dict(pairs)

    def check(value, depth):
        if depth > DEEPEST:
            raise ValueError(f"{key}: got more than {DEEPEST} sections in each other")
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ValueError(f"{key}: got an integer of {len(str(value))} digits")
        for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            check(inner, depth + 1)

    content = json.loads(text, object_pairs_hook=unique, parse_constant=_no_constant if key == "config" else None)
    if not isinstance(content, dict):
        raise ValueError(f"{key}: got {type(content).__name__}, allowed: a section")
    check(content, 0)
    for name in SECTIONS if key == "config" else ():
        if not isinstance(content.get(name, {}), dict):
            raise ValueError(f"config.{name}: got {type(content[name]).__name__}, allowed: a section")
    if key == "state":
        within(0, 2**63, step=content.get("step"))
    return content


def _no_constant(name):
    raise ValueError(f"config: got {name}, allowed: numbers")


def find_checkpoint(run_or_checkpoint):
    """The checkpoint file meant by a file or by a run folder (its last one)."""
    path = Path(run_or_checkpoint)
    if path.is_file():
        return path
    last = path / "checkpoints" / LAST
    if last.is_file():
        return last
    raise FileNotFoundError(
        f"checkpoint: got {path}, allowed: a .safetensors file or a run folder with checkpoints/{LAST}"
    )


def load_weights(module, tensors, name):
    """Load ``tensors`` into ``module``; ValueError as ``check_weights``."""
    check_weights(module, tensors, name)
    module.load_state_dict(tensors)


def check_weights(module, tensors, name):
    """Raise ValueError, by name, unless ``tensors`` are what ``module`` has: names, shapes, kinds, finite numbers.

    Floating-point tensors of another width are welcome: exports store large ones in half precision.
    """
    own = module.state_dict()
    missing = sorted(set(own) - set(tensors))
    unexpected = sorted(set(tensors) - set(own))
    shapes = [
        f"{key}: got {tuple(tensors[key].shape)}, allowed {tuple(own[key].shape)}"
        for key in sorted(set(own) & set(tensors))
        if own[key].shape != tensors[key].shape
    ]
    if missing or unexpected or shapes:
        parts = [("missing", missing), ("unexpected", unexpected), ("shapes", shapes)]
        listed = "; ".join(f"{what}: {', '.join(keys[:5])}{' ...' * (len(keys) > 5)}" for what, keys in parts if keys)
        raise ValueError(f"{name} does not fit this configuration: {listed}")
    for key, tensor in own.items():
        _check_numbers(f"{name}: {key}", tensors[key], tensor.dtype)
    for prefix, part in module.named_modules():
        if isinstance(part, Normalizer):
            prefix = f"{prefix}." if prefix else ""
            part.check({key: tensors[f"{prefix}{key}"] for key in part.state_dict()}, f"{name}: {prefix}")


def _check_numbers(name, tensor, dtype):
    """Raise ValueError unless ``tensor`` holds finite numbers that ``dtype`` can take without another meaning."""
    if tensor.dtype != dtype and not (tensor.is_floating_point() and dtype.is_floating_point):
        raise ValueError(f"{name}: got {tensor.dtype}, allowed: {dtype}")
    if tensor.is_floating_point() and not tensor.to(dtype).isfinite().all():
        raise ValueError(f"{name}: got NaN or inf, allowed: finite numbers")


def load_encoder_weights(encoder, tensors, name):
    """Load one camera's encoder from ``tensors`` of another that may see another grid; returns lines that say so.

    ValueError where more than the grid or the patch size differs (``adapt_weights``), with the keys.
    """
    for key, tensor in encoder.state_dict().items():
        if key in tensors:  # else ``load_weights`` says so
            _check_numbers(f"{name}: {key}", tensors[key], tensor.dtype)
    tensors, notes = adapt_weights(encoder, tensors) if hasattr(encoder, "grid") else (tensors, [])  # a ViT
    load_weights(encoder, tensors, name)
    return notes


def load_model(run_or_checkpoint, device="cpu"):
    """The model of a checkpoint with EMA weights, in evaluation mode; ``model.config`` is its configuration.

    Raises FileNotFoundError or ValueError: no checkpoint of ours, damaged, a configuration of no model or of another
    one than its weights, seen before it takes memory, or a device that torch does not see.
    """
    check_device(device)
    path = find_checkpoint(run_or_checkpoint)
    tensors, config, _ = load_checkpoint(path, prefix="ema.")
    try:
        built = dict(config)
        if "encoder" in config:  # weights from elsewhere would be downloaded, only to be overwritten
            built["encoder"] = {key: value for key, value in config["encoder"].items() if key != "pretrained"}
        sketch = outline(built)
    except (ImportError, OSError):  # of a package that is not installed
        raise
    except Exception as error:  # whatever classes raise for options that make no sense
        text = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"{path}: got a configuration of no model ({' '.join(text.split())})") from error
    check_weights(sketch, tensors, str(path))
    model = assemble(built)
    model.load_state_dict(tensors)
    model.config = config
    return model.to(device).eval()


def check_device(device):
    """Raise ValueError unless torch computes on ``device``."""
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        seen = "cpu, cuda" if torch.cuda.is_available() else "cpu (torch sees no CUDA device)"
        raise ValueError(f"device: got {str(device)!r}, allowed here: {seen}") from error


def load_policy(
    run_or_checkpoint, device="cpu", *, sampler=None, num_inference_steps=None, precision="fp32", cuda_graph=False
):
    """The policy of a run folder or checkpoint file: EMA weights, normaliser inside, evaluation mode.

    sampler and num_inference_steps replace those of the training configuration (``DiffusionPolicy.set_sampler``);
    precision and cuda_graph: see ``DiffusionPolicy.set_inference``. Raises FileNotFoundError or ValueError (not a
    checkpoint, damaged, or no policy; impossible options).
    """
    model = load_model(run_or_checkpoint, device)
    if not isinstance(model, Policy):
        raise ValueError(f"{run_or_checkpoint}: got a {model.config['model']['name']!r} checkpoint, allowed: a policy")
    model.set_sampler(sampler, num_inference_steps)
    model.set_inference(precision=precision, cuda_graph=cuda_graph)
    return model


def load_encoder(run_or_checkpoint, *, camera=None, device="cpu"):
    """The vision encoder of a policy or pre-training checkpoint: images (B, 3, h, w) in [-1, 1] -> (B, out_dim).

    camera: which observation key, for policies that have an encoder for each of several cameras. ``encoder.config`` is
    the configuration of the run that it comes from, ``encoder.camera`` the name of its camera there.
    """
    model = load_model(run_or_checkpoint, device)
    if not isinstance(getattr(model, "encoder", None), ObservationEncoder):
        kind = model.config["model"]["name"]
        raise ValueError(f"{run_or_checkpoint}: got a {kind!r} checkpoint, allowed: a model that sees")
    encoders = model.encoder.encoders
    if camera is None and len(encoders) == 1:
        (camera,) = encoders
    if camera not in encoders:
        raise ValueError(f"camera: got {camera!r}, allowed: {', '.join(encoders)}")
    encoders[camera].config, encoders[camera].camera = model.config, camera
    return encoders[camera]
