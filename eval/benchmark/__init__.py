"""What can be trained, one file a kind: the model, its data, how it is judged, what a finished run holds.

A kind keeps the contract ``Benchmark`` of policy/training/protocols.py. A new one is a file here, a line below and a
configuration whose ``model.name`` names it.
"""

from policy.registry import Registry, choose

BENCHMARKS = Registry(
    "model.name",
    __name__,
    {
        "diffusion": "policy:PolicyBenchmark",
        "keypoints": "keypoints:KeypointBenchmark",
        "image_classifier": "image:ImageBenchmark",
        "mae": "image:ImageBenchmark",
        "video_classifier": "video:VideoBenchmark",
        "language": "language:LanguageBenchmark",
        "translation": "translation:TranslationBenchmark",
    },
)


def build_benchmark(config, run_dir, *, resume=False):
    """The benchmark of the resolved configuration ``config``, a plain dict; its data are opened, its model is built.

    resume: the weights will come from the checkpoint in ``run_dir``. ``training.score``, where it is null, becomes the
    first metric of the kind. Raises ValueError for a metric that this run does not find.
    """
    kind, options = BENCHMARKS[config["model"]["name"]], config["training"]
    metrics = kind.metrics(config)
    options["score"] = choose("training.score", options["score"] or metrics[0], metrics)
    if resume and config.get("encoder", {}).get("pretrained", False):
        config["encoder"]["pretrained"] = False  # the checkpoint has the weights
    return kind(config, run_dir, resume=resume)
