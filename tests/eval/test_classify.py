"""Classifiers from the one door, probes and tests by the commands, an encoder's way between policy and classifier."""

import itertools
import json

import av
import numpy as np
import pytest
import tiny
import torch
import zarr
from door import door, stopped_run
from omegaconf import OmegaConf
from PIL import Image

from eval import classify_image, classify_video
from eval.benchmark import image
from eval.benchmark.classification import predict, summarise, topk, write_summary
from eval.benchmark.demonstrations import start_encoder
from policy.build import build_model
from policy.checkpoint import load_encoder, load_model

CLASSES = ("blue", "green", "red")
SMALL = ["encoder.dim=16", "encoder.depth=1", "encoder.num_heads=2", "encoder.mlp_ratio=2"]
QUICK = [*SMALL, "image_size=16", "workers=0", "training.epochs=3", "training.batch_size=8", "training.log_every=1"]


def picture(colour, rng):
    pixels = rng.integers(0, 90, (16, 16, 3), dtype=np.uint8)
    pixels[..., 2 - CLASSES.index(colour)] += 150
    return pixels


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An image folder of three colours, 16 for training and 8 for testing of each."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 16), ("test", 8)):
        for colour in CLASSES:
            (root / split / colour).mkdir(parents=True)
            for number in range(count):
                Image.fromarray(picture(colour, rng)).save(root / split / colour / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def policy_run(tmp_path_factory):
    """A checkpoint of a tiny policy that sees crops of 8 of 12 px."""
    config = tiny.policy_config(images=True)
    return tiny.save(tmp_path_factory.mktemp("policy") / "policy.safetensors", build_model(config), config)


def probe_images(*arguments):
    classify_image.main([str(argument) for argument in arguments])


def probe_videos(*arguments):
    classify_video.main([str(argument) for argument in arguments])


def summary(run):
    return json.loads((run / "summary.json").read_text())


# Images ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scratch(folder, tmp_path_factory):
    """A run from scratch on the three colours."""
    run = tmp_path_factory.mktemp("scratch") / "run"
    door("images", f"data={folder}", f"output={run}", "base_lr=0.3", *QUICK)
    return run


@pytest.mark.slow
def test_from_scratch(scratch, tmp_path, capsys):
    """Colours are learned; summary, pictures and checkpoint are those of the final EMA weights; so does the test."""
    found = summary(scratch)
    assert found["top1"] > 0.9 and found["chance"] == pytest.approx(1 / 3) and found["test_samples"] == 24
    assert sum(map(sum, found["confusion"])) == 24 and list(found["per_class"]) == list(CLASSES)
    low, high = found["top1_ci95"]
    assert low <= found["top1"] <= high
    for name in ("confusion.png", "examples.png", "curves.png"):
        assert Image.open(scratch / name).size[0] > 100
    config = OmegaConf.load(scratch / "resolved.yaml")
    assert config.classes == list(CLASSES)
    _, test_data = image.open_data(OmegaConf.to_container(config))
    scores, labels = predict(load_model(scratch), test_data)
    assert topk(scores, labels, 1) == pytest.approx(found["top1"])
    probe_images("--checkpoint", scratch, "--output", tmp_path)
    assert summary(tmp_path)["confusion"] == found["confusion"]
    with pytest.raises(SystemExit):
        probe_images("--checkpoint", scratch, "--data", "pusht_octant")  # other classes
    assert "--data" in capsys.readouterr().err


def test_names_of_classes_are_no_formulas(tmp_path):
    """Folders may be called anything; pictures show it."""
    names = (r"$\frac$", "$x$", "$a", "数" * 50)
    rng = np.random.default_rng(0)
    for name, number in itertools.product(names, range(3)):
        (tmp_path / "data" / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture("red", rng)).save(tmp_path / "data" / name / f"{number}.png")
    options = ["--output", tmp_path / "run", *SMALL, "image_size=16", "workers=0", "training.epochs=1", "resize=20"]
    probe_images("--data", tmp_path / "data", "--encoder", "random", *options)
    assert set(summary(tmp_path / "run")["per_class"]) == set(names)
    for name in ("confusion.png", "examples.png"):
        assert Image.open(tmp_path / "run" / name).size[0] > 100


def test_many_classes_have_no_confusion(tmp_path):
    """Its file grows with their square."""
    labels = torch.arange(1200)
    many = summarise(torch.eye(1200)[:, torch.arange(1200).roll(1)], labels, [str(label) for label in range(1200)])
    assert many["confusion"] is None and many["top1"] == 0 and set(many["per_class"].values()) == {0}
    write_summary(tmp_path, many)
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]
    few = summarise(torch.eye(3)[[0, 1, 1, 2]], torch.tensor([0, 1, 2, 2]), list("abc"))
    assert few["confusion"] == [[1, 0, 0], [0, 1, 0], [0, 1, 1]] and few["per_class"] == {"a": 1, "b": 1, "c": 0.5}


def test_results_are_not_overwritten(scratch, folder, tmp_path, monkeypatch, capsys):
    """Two tests of one run have two folders; a probe refuses the folder of another."""
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        probe_images("--checkpoint", scratch)
    assert len(list((tmp_path / "runs/tests").iterdir())) == 2
    before = (scratch / "summary.json").read_bytes()
    with pytest.raises(SystemExit):
        probe_images("--data", folder, "--encoder", "random", "--output", scratch, "training.epochs=1")
    assert "output" in capsys.readouterr().err and (scratch / "summary.json").read_bytes() == before


def test_a_stopped_run_goes_on(scratch, tmp_path):
    """Nine of eighteen steps, then the rest: the same weights as in one go."""
    half = tmp_path / "half"
    stopped_run(scratch, half, 9)
    door("images", f"resume={half}")
    whole, resumed = load_encoder(scratch).state_dict(), load_encoder(half).state_dict()
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert summary(half)["confusion"] == summary(scratch)["confusion"]


def test_probe_compares_encoders(folder, policy_run, tmp_path, capsys):
    """Probes leave the encoder alone, see pictures of its size, and stand side by side."""
    probe_images("--data", folder, "--encoder", "random", policy_run, "--output", tmp_path, "training.epochs=2")
    table = json.loads((tmp_path / "comparison.json").read_text())
    assert list(table) == ["random", str(policy_run)] and Image.open(tmp_path / "comparison.png").size[0] > 100
    assert "| chance | 33.3% | |" in capsys.readouterr().out
    runs = [tmp_path / "0_random", tmp_path / "1_policy"]
    encoders = [load_encoder(run).state_dict() for run in runs]
    policy = load_encoder(policy_run).state_dict()
    assert all(torch.equal(policy[key], encoders[1][key]) for key in policy)
    assert not torch.equal(policy["readout.weight"], encoders[0]["readout.weight"])
    assert encoders[0].keys() == policy.keys()
    assert summary(runs[1])["image_size"] == 8


def test_finetuning_starts_from_the_policy_with_another_grid(folder, policy_run, tmp_path, capsys):
    """A resumed run does not read the file that it started from."""
    options = ["image_size=16", "workers=0", "base_lr=1e-9", "training.checkpoint_every=1"]
    copy = tmp_path / "start.safetensors"
    copy.write_bytes(policy_run.read_bytes())
    start = [f"data={folder}", f"encoder.init={copy}", f"output={tmp_path}/run", *options]
    door("images", *start, "training.max_steps=1", name="finetune")
    assert "position codes interpolated from 2x2 to 4x4 patches" in capsys.readouterr().out
    policy, tuned = load_encoder(policy_run).state_dict(), load_encoder(tmp_path / "run").state_dict()
    torch.testing.assert_close(tuned["vit.blocks.0.attn.qkv.weight"], policy["vit.blocks.0.attn.qkv.weight"])
    assert tuned["vit.pos_embed"].shape == (1, 17, 16)
    assert len(load_encoder(tmp_path / "run").vit.blocks[0].attn.mask[0]) == 17
    copy.unlink()
    door("images", f"resume={tmp_path}/run", "training.max_steps=2")


def test_attention_of_an_encoder_may_be_replaced(folder, policy_run, tmp_path):
    options = ["image_size=16", "workers=0", "training.max_steps=1", "attention=softmax", f"encoder.init={policy_run}"]
    door("images", f"data={folder}", f"output={tmp_path}/run", *options, name="finetune")
    assert summary(tmp_path / "run")["attention"] == "softmax"


def test_a_policy_starts_from_a_classifier(scratch):
    """encoder.init=RUN of a classification run: its weights, on the policy's grid; another width is refused."""
    source = OmegaConf.to_container(OmegaConf.load(scratch / "resolved.yaml"))
    config = {**tiny.policy_config(images=True), "encoder": source["encoder"], "attention": source["attention"]}
    model = build_model(config)
    starting = {"init": str(scratch), "freeze": False, "attention": config["attention"]}
    assert "position codes interpolated from 4x4 to 2x2 patches" in start_encoder(model, **starting)
    own, learned = model.encoder.encoders["image"].state_dict(), load_encoder(scratch).state_dict()
    assert [key for key in own if not torch.equal(own[key], learned[key])] == ["vit.pos_embed"]
    wider = build_model({**config, "encoder": {**source["encoder"], "dim": 32}})
    with pytest.raises(ValueError, match="vit.blocks.0.attn.proj.weight"):
        start_encoder(wider, **starting)


def test_pretraining_starts_a_classifier(folder, tmp_path):
    options = ["workers=0", "image_size=16", "training.max_steps=2", *SMALL]
    sizes = ["model.decoder_dim=16", "model.decoder_depth=1", "model.decoder_heads=2"]
    door("images", f"data={folder}", f"output={tmp_path}/mae", *options, *sizes, name="pretrain")
    assert any((tmp_path / "mae" / "reconstructions").iterdir())
    probe_images("--data", folder, "--encoder", tmp_path / "mae", "--output", tmp_path / "probe", "training.epochs=1")
    learned, probed = load_encoder(tmp_path / "mae").state_dict(), load_encoder(tmp_path / "probe").state_dict()
    assert all(torch.equal(learned[key], probed[key]) for key in learned)


@pytest.mark.parametrize("task", ["pusht_octant", "pusht_side"])
def test_embedded_images(task, folder, tmp_path, capsys):
    """A few rendered scenes; a change that would alter their labels is refused, and so is a test on other classes."""
    options = [f"embedded.{task}.frames=400", f"cache_dir={tmp_path}/cache", "training.epochs=1"]
    probe = ["--data", task, "--output", tmp_path / "run", "--encoder", "random"]
    probe_images(*probe, *options, *SMALL)
    assert len(summary(tmp_path / "run")["per_class"]) == 8
    for change in ("augment.flip=0.5", "workers=2", "resize=99"):
        with pytest.raises(SystemExit):
            door(task, change, *options)
        assert change.split("=")[0] in capsys.readouterr().err
    with pytest.raises(SystemExit):
        probe_images(*probe, f"embedded.{task}.pad=3", *options)
    assert f"embedded.{task}.pad" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        probe_images("--checkpoint", tmp_path / "run", "--data", folder)
    assert "--data: got classes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "key"),
    [
        (lambda: door("images", "data=x", "encoder.init=x"), "encoder.init"),
        (lambda: door("images", "data=x", name="finetune"), "encoder.init"),
        (lambda: door("images", "data=x", "recipe.label_smoothing=0.2", name="pretrain"), "recipe.label_smoothing"),
        (lambda: door("images"), "data"),
        (lambda: door("images", "data=cifra10"), "cifra10"),
        (lambda: door("cifar10", "training.epochs=none"), "training.epochs"),
        (lambda: door("cifar10", "modle.hidden=3"), "modle.hidden"),
        (lambda: door("images", "resume=nowhere"), "nowhere"),
        (lambda: probe_images("--encoder", "random", "recipe.mixup=0.1"), "recipe.mixup"),
        (lambda: probe_images("--encoder", "a", "a"), "--encoder"),
        (lambda: probe_images("--encoder", "nowhere"), "nowhere"),
        (lambda: probe_images("--checkpoint", "pretrained/pusht_policy.safetensors"), "--checkpoint"),
    ],
)
def test_wrong_arguments(command, key, capsys):
    with pytest.raises(SystemExit) as end:
        command()
    error = capsys.readouterr().err
    assert end.value.code == 1 and key in error and error.count("\n") == 1


# Videos ----------------------------------------------------------------------------------------------------------


def write_video(path, colour, rng):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 16
        stream.pix_fmt = "yuv420p"
        for _ in range(6):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture(colour, rng), format="rgb24")))
        container.mux(stream.encode())


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Lists of coloured videos, one of which is no video."""
    root, rng = tmp_path_factory.mktemp("videos"), np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 3)):
        lines = []
        for label, number in itertools.product(range(3), range(count)):
            name = f"{split}_{label}_{number}.avi"
            write_video(root / name, CLASSES[label], rng)
            lines.append(f"{name} {label}")
        (root / f"{split}_broken.avi").write_bytes(b"no video")
        (root / f"{split}.csv").write_text("\n".join([*lines, f"{split}_broken.avi 0"]))
    (root / "classes.txt").write_text("\n".join(CLASSES))
    return root


def test_labels_of_videos_may_be_names(videos, tmp_path):
    """Without classes.txt the sorted names are the classes, of training and test alike."""
    for split in ("train", "test"):
        rows = (line.rsplit(" ", 1) for line in (videos / f"{split}.csv").read_text().splitlines())
        lines = [f"{videos}/{name},{CLASSES[2 - int(label)]}" for name, label in rows]
        (tmp_path / f"{split}.csv").write_text("\n".join(["path,label", *lines]))
    door("videos", f"data={tmp_path}", f"output={tmp_path}/run", *CLIPS, *SMALL, "training.max_steps=1")
    assert list(summary(tmp_path / "run")["per_class"]) == sorted(CLASSES)


CLIPS = ["image_size=16", "frames=2", "stride=2", "workers=0", "training.epochs=3", "training.batch_size=6"]


@pytest.mark.parametrize("space_time", ["divided", "joint", "space"])
def test_videos_from_scratch(videos, tmp_path, space_time, capsys):
    """Colours are learned; a video that cannot be read is counted and left out; the test repeats the result."""
    options = [*CLIPS, *SMALL, f"model.space_time={space_time}", "base_lr=0.3", "spatial_views=3", "target_fps=10"]
    door("videos", f"data={videos}", f"output={tmp_path}/run", *options)
    found = summary(tmp_path / "run")
    assert found["test_samples"] == 9 and len(found["unreadable"]) == 2 and found["top1"] > 0.6
    assert "1 of 10 videos could not be read" in capsys.readouterr().out
    probe_videos("--checkpoint", tmp_path / "run", "--output", tmp_path / "again")
    assert summary(tmp_path / "again")["confusion"] == found["confusion"]


def test_video_probe_of_a_policy(videos, policy_run, tmp_path):
    """Features of single frames, once; the encoder stays what it was."""
    options = ["frames=2", "stride=1", "workers=0", "training.epochs=2"]
    probe_videos("--data", videos, "--encoder", policy_run, "--output", tmp_path, *options)
    policy, probed = load_encoder(policy_run).state_dict(), load_encoder(tmp_path).state_dict()
    assert all(torch.equal(policy[key], probed[key]) for key in policy)
    assert summary(tmp_path)["test_samples"] == 9


def test_embedded_clips(tmp_path, capsys):
    """Which way the block turns, on short demonstrations; options of videos are refused."""
    source = tmp_path / "demos.zarr"
    make_turning(source)
    options = [f"embedded.pusht_turn.source={source}", "embedded.pusht_turn.every=1", f"cache_dir={tmp_path}/cache"]
    options += ["frames=2", "stride=4", "training.epochs=2", *SMALL]
    probe_videos("--encoder", "random", "--output", tmp_path / "run", *options)
    assert set(summary(tmp_path / "run")["per_class"]) == {"counter-clockwise", "clockwise", "still"}
    door("pusht_turn", f"output={tmp_path}/trained", "training.max_steps=1", *options)
    assert summary(tmp_path / "trained")["mode"] == "scratch"
    with pytest.raises(SystemExit):
        door("pusht_turn", "target_fps=10", *options)
    assert "target_fps" in capsys.readouterr().err


def make_turning(path):
    """Thirty episodes of ten frames whose block turns either way, or not at all."""
    states = np.full((30, 10, 5), 250.0, dtype=np.float32)
    states[..., 0] = 50
    speed = np.tile([-0.1, 0.0, 0.1], 10)
    states[..., 4] = 3 + speed[:, None] * np.arange(10)
    root = zarr.open_group(str(path), mode="w", zarr_format=2)
    root.create_array("data/state", data=states.reshape(300, 5))
    root.create_array("data/action", data=np.zeros((300, 2), np.float32) + 1)
    root.create_array("meta/episode_ends", data=np.arange(10, 301, 10))
