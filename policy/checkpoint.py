"""Checkpoints: one safetensors file each, whose header carries the configuration and the training state as JSON.

Written to a temporary file, flushed and renamed, so a killed process or a full disk leaves the previous one whole;
loading never executes code.
"""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from policy.build import build_model
from policy.encoder.adapt import adapt_weights
from policy.files import whole
from policy.training.protocols import Policy

FORMAT = "fibottention-policy-1"
LAST = "last.safetensors"


def save_checkpoint(path, tensors, *, config, state):
    """Write ``tensors`` {name: tensor} with the JSON-able dicts ``config`` and ``state``, atomically.

    Raises OSError when the disk refuses; an older file at ``path`` then stays as it was.
    """
    path = Path(path)
    metadata = {"format": FORMAT, "config": json.dumps(config), "state": json.dumps(state)}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
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

    Raises FileNotFoundError, or ValueError for a file that is not one of ours or is damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: got {path}, which is not a file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"{path}: got format {metadata.get('format')!r}, allowed: {FORMAT!r}")
            config, state = json.loads(metadata["config"]), json.loads(metadata["state"])
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118 (not a dict)
            tensors = {name[len(prefix) :]: file.get_tensor(name) for name in names}
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path}: got a damaged or foreign file ({error}), allowed: a checkpoint of this project"
        ) from error
    return tensors, config, state


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
    """Load ``tensors`` into ``module``; ValueError lists the keys and shapes that do not match."""
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
    module.load_state_dict(tensors)


def load_encoder_weights(encoder, tensors, name):
    """Load one camera's encoder from ``tensors`` of another that may see another grid; returns lines that say so.

    ValueError where more than the grid or the patch size differs (``adapt_weights``), with the keys.
    """
    tensors, notes = adapt_weights(encoder, tensors) if hasattr(encoder, "grid") else (tensors, [])  # a ViT
    load_weights(encoder, tensors, name)
    return notes


def load_model(run_or_checkpoint, device="cpu"):
    """The model of a checkpoint with EMA weights, in evaluation mode; ``model.config`` is its configuration."""
    path = find_checkpoint(run_or_checkpoint)
    tensors, config, _ = load_checkpoint(path, prefix="ema.")
    built = dict(config)
    if "encoder" in config:  # weights from elsewhere would be downloaded, only to be overwritten
        built["encoder"] = {key: value for key, value in config["encoder"].items() if key != "pretrained"}
    model = build_model(built)
    load_weights(model, tensors, str(path))
    model.config = config
    return model.to(device).eval()


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
    encoders = model.encoder.encoders
    if camera is None and len(encoders) == 1:
        (camera,) = encoders
    if camera not in encoders:
        raise ValueError(f"camera: got {camera!r}, allowed: {', '.join(encoders)}")
    encoders[camera].config, encoders[camera].camera = model.config, camera
    return encoders[camera]
