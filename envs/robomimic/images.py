"""The images of any robomimic HDF5 that holds states, drawn as robomimic's dataset_states_to_obs does.

The result holds everything of the source and, as obs, the images and low-dimensional values of its states; rewards and
dones too where the source lacks them.

A demo's own MuJoCo model (model_file) is used when it was recorded with the installed robosuite. Models of other
versions cannot be built any more: then only the states are restored, in the model of the installed version.
"""

import functools
import json
from pathlib import Path

import h5py
import numpy as np

from envs.robomimic.backend import choose_renderer
from envs.robomimic.env import CAMERAS, RobosuiteEnv
from envs.robomimic.hdf5 import (
    demo_names,
    draw_states,
    has_images,
    installed_version,
    new_file,
    open_file,
    outcome,
    stored_arguments,
    write_part,
)
from envs.robomimic.hdf5_checks import check_stored
from envs.robomimic.metadata import check_env_args, same_model
from envs.shared.checks import check_positive
from envs.shared.files import digest
from envs.shared.item_set import make_set
from envs.shared.workers import usual_processes

VERSION = 1  # raise it when the same file gives other images


@functools.cache
def _environment(env_args, cameras, image_size):
    """The environment of this process, as making one takes seconds, and the XML of its own model."""
    env = RobosuiteEnv(
        env_args=json.loads(env_args),
        actions="recorded",
        cameras=cameras,
        image_size=image_size,
        film_camera=cameras[0],
    )
    return env, env.model_xml


def render_demo(path, source, name, env_args, cameras, image_size, with_model):
    """Draws one demo of ``source`` and stores what is new at ``path``; ValueError names the demo that does not fit."""
    with open_file(source) as file:
        demo = file["data"][name]
        states, actions = demo["states"][()], demo["actions"][()]
        recorded, missing = demo.attrs.get("model_file"), [key for key in ("rewards", "dones") if key not in demo]
    try:
        env, own = _environment(env_args, cameras, image_size)
        model = recorded if with_model else own
        if model != env.model_xml:
            _load(env, model)
        obs, success = draw_states(env, states)
        if missing:
            env.robosuite.step(actions[-1])  # from the last state, which is where the environment is
    except (ValueError, AssertionError) as error:
        raise ValueError(f"{source}: data/{name}: {error}") from error
    outcomes = outcome(np.append(success[1:], env.success))
    new = {f"obs/{key}": values for key, values in obs.items()} | {key: outcomes[key] for key in missing}
    write_part(path, new)


def _load(env, model):
    try:
        env.load_model(model)
    except ValueError:
        _environment.cache_clear()  # it is of no use any more
        env.close()
        raise


def check_source(file, path):
    """(demo names, env_args) of an open file whose states can be drawn; ValueError says what it lacks."""
    names = demo_names(file, path)
    if "env_args" not in file["data"].attrs:
        raise ValueError(
            f"{path}: data: got no attribute env_args, allowed: robomimic's; its convert_robosuite.py adds it to files"
            " of robosuite"
        )
    try:
        env_args = dict(json.loads(file["data"].attrs["env_args"]))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: data: got no readable attribute env_args ({error}), allowed: robomimic's") from error
    try:
        check_env_args(env_args, [env_args.get("env_name")])  # its name is checked by who knows all of robosuite's
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    for name in names:
        demo = file["data"][name]
        arrays = [demo.get(key) if isinstance(demo, h5py.Group) else None for key in ("states", "actions")]
        shapes = [getattr(array, "shape", None) for array in arrays]
        if shapes[0] is None:
            raise ValueError(f"{path}: data/{name}: got no states to draw, allowed: states (L, S)")
        if shapes[1] is None or [len(shape) for shape in shapes] != [2, 2] or shapes[0][0] != shapes[1][0]:
            raise ValueError(
                f"{path}: data/{name}: got states {shapes[0]} and actions {shapes[1]}, allowed: (L, S) and (L, A)"
            )
        if not shapes[0][0]:
            raise ValueError(f"{path}: data/{name}: got no frames, allowed: 1 or more")
        for array in arrays:
            check_stored(array, f"{path}: {array.name}")
    return names, env_args


def render_file(source, output, *, cameras=CAMERAS, image_size=84, processes=1):
    """Make ``output``: ``source`` with images, ``cameras`` and square ``image_size`` px; False when it was there.

    Raises FileNotFoundError for no source, ValueError for one without fitting states, of another simulator or version,
    or damaged; ImportError without robosuite, OSError without OpenGL.
    """
    source, output, cameras = Path(source), Path(output), tuple(cameras)
    if not cameras or not all(cameras):
        raise ValueError(f"cameras: got {','.join(cameras)!r}, allowed: names of cameras, such as {','.join(CAMERAS)}")
    check_positive(image_size=image_size, processes=processes)
    with open_file(source) as file:
        names, env_args = check_source(file, source)
        all_models = all("model_file" in file["data"][name].attrs for name in names)
    arguments = {
        "version": VERSION,
        "source": f"sha256:{digest(source)}",
        "cameras": list(cameras),
        "image_size": image_size,
    }
    with_model = False
    if not output.exists():
        installed = installed_version()
        with_model = same_model(env_args, installed) and all_models
        if not with_model:
            recorded = f"robosuite {env_args.get('env_version')}" if all_models else "no model_file"
            print(
                f"{source}: {recorded}, installed {installed}: only the states are restored; sizes drawn with the"
                " model, such as the cube of Lift, are not those recorded"
            )
        choose_renderer()  # once, instead of in every worker
    text = json.dumps(env_args)
    return make_set(
        output,
        arguments,
        work=render_demo,
        jobs=[(str(source), name, text, cameras, image_size, with_model) for name in names],
        suffix=".hdf5",
        processes=processes,
        stored=stored_arguments,
        finish=lambda place, paths: _join(source, place, names, paths, arguments),
        unit="demo",
        description="rendering",
    )


def _join(source, place, names, paths, arguments):
    """Writes the file ``place`` from ``source`` and the new parts of its demos."""
    with open_file(source) as old:
        env_args = json.loads(old["data"].attrs["env_args"])
        size, cameras = arguments["image_size"], arguments["cameras"]
        env_args["env_kwargs"] |= {"camera_names": cameras, "camera_heights": size, "camera_widths": size}
        with new_file(place, env_args=env_args, arguments=arguments) as file:
            file["data"].attrs.update({key: value for key, value in old["data"].attrs.items() if key != "env_args"})
            for name, path in zip(names, paths, strict=True):
                demo = file["data"].create_group(name)
                demo.attrs.update(old["data"][name].attrs)
                with h5py.File(path, "r") as part:
                    _copy(part["demo"], demo)
                    demo.attrs["num_samples"] = len(old["data"][name]["actions"])
                _copy(old["data"][name], demo)
            for name in set(old) - {"data"}:
                old.copy(name, file)
            file.attrs.update({key: value for key, value in old.attrs.items() if key not in file.attrs})


def _copy(source, target):
    """Copies what ``target`` does not have yet, group by group."""
    for name, item in source.items():
        if isinstance(item, h5py.Group) and name in target:
            _copy(item, target[name])
        elif name not in target:
            source.copy(name, target)


def ensure_file(*, source, cache_dir, image_size=84, cameras=CAMERAS):
    """Path of ``source``, or of a copy with images, drawn once under ``cache_dir``, of a robomimic HDF5 without any.

    A zarr (folder or .zip) and an HDF5 with images are returned as they are. Raises FileNotFoundError for a missing
    source, else as ``render_file``.
    """
    source, cache_dir = Path(source), Path(cache_dir)
    if not source.exists():
        raise FileNotFoundError(f"data set: got {source}, which does not exist")
    if source.is_dir() or source.suffix == ".zip":
        return source
    with open_file(source) as file:
        if has_images(file, source):
            return source
    content = digest("\n".join([str(VERSION), digest(source), *cameras]))
    target = cache_dir / f"{source.stem}_{image_size}px_{content[:12]}.hdf5"
    if not target.exists():
        print(f"drawing the images of {source} once into {target}")
    render_file(source, target, cameras=cameras, image_size=image_size, processes=usual_processes())
    return target
