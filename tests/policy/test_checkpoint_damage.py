"""What is damaged, foreign or a lie is refused in one line, wherever it is."""

import copy
import functools
import itertools
import json
import pickle
import random

import numpy as np
import pytest
import torch
from checkpoints import CONFIG, STATE, policy_checkpoint, tensors
from paths import ROOT
from safetensors.torch import save_file

from policy import load_encoder, load_policy
from policy.checkpoint import (
    FORMAT,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
)

# Wrong files -----------------------------------------------------------------------------------------------------


def test_missing_files(tmp_path):
    for load in (find_checkpoint, load_checkpoint, load_policy, load_encoder):
        for place in (tmp_path / "missing.safetensors", tmp_path):  # a folder that is no run
            with pytest.raises(FileNotFoundError, match=f"checkpoint: got {place}"):
                load(place)


WEIGHTS = {"a": torch.zeros(2)}
FOREIGN = {  # writers of files that are no checkpoint of ours
    "empty": lambda path: path.touch(),
    "text": lambda path: path.write_text("seed: 42\n" * 100),
    "zeros": lambda path: path.write_bytes(bytes(4096)),
    "random": lambda path: path.write_bytes(np.random.default_rng(0).bytes(4096)),
    "torch": lambda path: torch.save(WEIGHTS, path),
    "pickle": lambda path: path.write_bytes(pickle.dumps({"step": 1})),
    "other safetensors": lambda path: save_file(WEIGHTS, path),
    "other format": lambda path: save_file(WEIGHTS, path, metadata={"format": "pt"}),
    "our format alone": lambda path: save_file(WEIGHTS, path, metadata={"format": FORMAT}),
    "broken json": lambda path: save_file(WEIGHTS, path, metadata={"format": FORMAT, "config": "{", "state": "{}"}),
}


@pytest.mark.parametrize("write", FOREIGN.values(), ids=FOREIGN)
def test_foreign_files(tmp_path, write):
    path = tmp_path / "x.safetensors"
    write(path)
    for load in (load_checkpoint, load_policy, load_encoder):
        with pytest.raises(ValueError, match="x.safetensors: got .*allowed"):
            load(path)


def test_truncated_files(tmp_path):
    """Cut anywhere: never a half-loaded policy, never an exception of another kind."""
    path, _ = policy_checkpoint(tmp_path / "x.safetensors")
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    cuts = [1, 7, 8, 9, header // 2, header - 1, header, header + 1, len(whole) // 2, len(whole) - 1]
    for content in (*(whole[:cut] for cut in cuts), whole + b"more"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="x.safetensors"):
            load_policy(path)
    path.write_bytes(whole)
    assert load_policy(path)


def load_training(path):
    """All tensors, as resuming reads them."""
    return load_checkpoint(path)


def load_averages(path):
    """The averaged weights alone."""
    return load_checkpoint(path, prefix="ema.")


@pytest.mark.parametrize("load", [load_training, load_averages, load_policy, load_encoder])
def test_a_flipped_bit_is_refused_wherever_it_is(tmp_path, load):
    """In the length, the header or the body of what is read: one line that names the file."""
    path, model = policy_checkpoint(tmp_path / "x.safetensors", images=True)
    if load is load_training:
        tensors, config, _ = load_checkpoint(path)
        weights = model.state_dict()
        others = {f"{part}.{name}": w.float() for part in ("model", "optimizer.exp_avg") for name, w in weights.items()}
        save_checkpoint(path, tensors | others, config=config, state=STATE)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    rng = random.Random(0)
    places = [*range(8), *(rng.randrange(8, header) for _ in range(100)), header - 1]
    places += [header, *(rng.randrange(header, len(whole)) for _ in range(60)), len(whole) - 1]
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="x.safetensors: got") as refusal:
            load(path)
        assert "\n" not in str(refusal.value)
    path.write_bytes(whole)
    assert load(path)


def test_what_is_not_read_is_not_compared(tmp_path):
    """Averaged weights load where only the moments of the optimizer are damaged; resuming refuses these, by name."""
    path = tmp_path / "x.safetensors"
    save_checkpoint(path, tensors() | {"optimizer.z": torch.arange(1000.0)}, config=CONFIG, state=STATE)
    content = bytearray(path.read_bytes())
    content[content.index(torch.arange(1000.0).numpy().tobytes()) + 2000] ^= 4
    path.write_bytes(content)
    assert torch.equal(load_averages(path)[0]["weight"], tensors()["ema.weight"])
    with pytest.raises(ValueError, match="'optimizer.z'"):
        load_training(path)


def edit_header(path, change):
    """Call ``change`` with the header (a dict), and write what it returns: None, or the bytes that take its place."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    text = change(header)
    text = json.dumps(header).encode() if text is None else text
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def set_metadata(key, value):
    return lambda header: header["__metadata__"].update({key: value})


def rename(old, new):
    return lambda header: header.update({new: header.pop(old)})


def exchange(header):
    header["ema.a"], header["ema.b"] = header["ema.b"], header["ema.a"]


def twice(header):
    entry = json.dumps({"ema.c": header["ema.a"]})[1:]
    return json.dumps(header).encode()[:-1] + b", " + entry.encode()


LIES = {
    "another configuration": set_metadata("config", '{"seed": 4}'),
    "another step": set_metadata("state", '{"step": 13}'),
    "another digest": set_metadata("digest", "0" * 64),
    "other digests": set_metadata("digests", "{}"),
    "no digest": lambda header: header["__metadata__"].pop("digest") and None,
    "more texts": set_metadata("more", "text"),
    "exchanged tensors": exchange,
    "another name": rename("ema.a", "ema.d"),
    "another part": rename("ema.a", "model.a"),
    "another type": lambda header: header["ema.a"].update(dtype="I32"),
    "another shape": lambda header: header["ema.a"].update(shape=[3, 2]),
    "a huge shape": lambda header: header["ema.a"].update(shape=[2**40, 2**40]),
    "beyond the end": lambda header: header["ema.a"].update(data_offsets=[0, 2**40]),
    "a tensor twice": twice,
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_headers_that_lie(tmp_path, lie):
    path = tmp_path / "x.safetensors"
    weights = {"ema.a": torch.rand(2, 3), "ema.b": torch.rand(2, 3), "model.c": torch.rand(5)}
    save_checkpoint(path, weights, config=CONFIG, state=STATE)
    edit_header(path, lambda header: None)
    assert load_checkpoint(path)[1] == CONFIG  # written by another program
    edit_header(path, lie)
    with pytest.raises(ValueError, match="x.safetensors: got"):
        load_checkpoint(path)


def test_checkpoints_from_before_there_were_digests_load_with_a_note(tmp_path, capsys):
    """And no text of a newer one can be dropped to look like them."""
    path, model = policy_checkpoint(tmp_path / "x.safetensors")

    def to_older(header):
        for key in ("digests", "digest"):
            del header["__metadata__"][key]

    load_policy(path)
    assert capsys.readouterr().err == ""
    edit_header(path, to_older)
    loaded = load_policy(path)
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    (line,) = capsys.readouterr().err.splitlines()
    assert "x.safetensors" in line and "digests" in line


@pytest.mark.parametrize("path", sorted((ROOT / "pretrained").glob("*.safetensors")), ids=lambda path: path.stem)
def test_shipped_checkpoints_have_digests(path, capsys):
    assert load_averages(path)[0]
    assert capsys.readouterr().err == ""


# Contents that are no configuration or state -------------------------------------------------------------------------

DEEP = "[" * 100_000 + "]" * 100_000
JSON = {  # text: of the configuration, of the state
    "null": ("null", "null"),
    "a number": ("3", "3"),
    "a list": ("[]", "[1]"),
    "text": ('"x"', '"x"'),
    "deep": (DEEP, DEEP),
    "quite deep": ('{"a":' + "[" * 80 + "]" * 80 + "}",) * 2,
    "a huge integer": ('{"step": 1' + "0" * 30 + "}",) * 2,
    "an endless integer": ('{"step": ' + "9" * 10_000 + "}",) * 2,
    "NaN": ('{"step": NaN}',) * 2,
    "infinity": ('{"step": 1, "a": [Infinity]}', '{"step": Infinity}'),
    "a key twice": ('{"step": 1, "step": 1}',) * 2,
    "sections": ('{"model": []}', "{}"),
    "no step": ('{"task": "pusht"}', '{"steps": 3}'),
    "a step that is none": ('{"rollout": null}', '{"step": -1}'),
    "text as step": ('{"encoder": 3}', '{"step": "3"}'),
    "half a step": ('{"attention": "softmax"}', '{"step": 1.5}'),
}


@pytest.mark.parametrize("part", ["config", "state"])
@pytest.mark.parametrize("case", JSON)
def test_texts_of_the_right_form_and_wrong_content(tmp_path, case, part):
    """With right digests, as a program would write them."""
    path, texts = tmp_path / "x.safetensors", {"config": json.dumps(CONFIG), "state": json.dumps(STATE)}
    texts[part] = JSON[case][part == "state"]
    save_file(WEIGHTS, path, metadata={"format": FORMAT, **texts})
    for load in (load_checkpoint, load_policy, load_encoder):
        with pytest.raises(ValueError, match="x.safetensors: got") as refusal:
            load(path)
        assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 500


def test_a_state_may_hold_what_a_run_measured(tmp_path):
    save_checkpoint(tmp_path / "x", WEIGHTS, config=CONFIG, state={"step": 3, "score": float("nan")})
    assert np.isnan(load_checkpoint(tmp_path / "x")[2]["score"])
    with pytest.raises(ValueError):  # but a configuration that could not be read again is not written
        save_checkpoint(tmp_path / "y", WEIGHTS, config={"lr": float("nan")}, state={"step": 3})
    assert not (tmp_path / "y").exists()


WRONG = (None, -1, 0, 10**9, 2.5, "text", [], {}, "module:X", [[1]], True)


@pytest.mark.parametrize("key", ["model", "encoder", "attention", "crop", "task"])
def test_configurations_of_no_model_are_refused_in_one_line(tmp_path, key):
    """Values of the section that are wrong, some of all; nothing is imported and nothing hangs."""
    path, model = policy_checkpoint(tmp_path / "x.safetensors", images=True)
    config = load_checkpoint(path)[1]
    weights = {f"ema.{name}": tensor for name, tensor in model.state_dict().items()}

    def places(section, above=()):
        for name in section if isinstance(section, dict) else range(len(section)):
            yield (*above, name)
            if isinstance(section[name], dict | list):
                yield from places(section[name], (*above, name))

    cases = list(itertools.product(places({key: config[key]}), WRONG))
    cases, refused = random.Random(0).sample(cases, min(len(cases), 40)), 0
    for (*above, name), wrong in cases:
        changed = copy.deepcopy(config)
        section = functools.reduce(lambda inner, part: inner[part], above, changed)
        section[name] = wrong
        save_checkpoint(path, weights, config=changed, state=STATE)
        try:
            load_policy(path)
        except ValueError as error:
            assert "\n" not in str(error) and "x.safetensors" in str(error)
            refused += 1
    assert refused > len(cases) / 3
