"""Configurations as train.py composes them."""

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from paths import ROOT

import eval.shared.compose  # noqa: F401 (the resolvers of the configuration)

FOLDERS = sorted(path.parent for path in (ROOT / "config").glob("*/typea.yaml"))


def composed(folder, name, *overrides):
    """The resolved configuration of ``train.py --config-dir=FOLDER --config-name=NAME``, as a dict."""
    GlobalHydra.instance().clear()
    searched = [f"hydra.searchpath=[file://{ROOT}/config]"]
    with initialize_config_dir(str(folder), version_base="1.3"):
        return OmegaConf.to_container(compose(name, [*searched, *overrides]), resolve=True)
