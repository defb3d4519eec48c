"""The run folder: whose it is, and where things lie in it.

runs/<run>/recipe.yaml        the resolved recipe, the folder's identity
runs/<run>/<stage>/           checkpoints, for resuming only; and `model/`, what the stage leaves for the next
                              damaged.jsonl: samples that others stood in for; traces/: profiles
runs/<run>/model/             what the last stage leaves: `ssmvl.load("runs/<run>")`
runs/<run>/tensorboard/       logs
runs/<run>/.lock              held by the launch that is at work; says which
runs/<run>/results.json, answers.png, curves.png
runs/<run>/example.png           a picture it has never seen
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from ssmvl.data.remote import is_remote
from ssmvl.errors import RunError
from ssmvl.files import ABOUT_FILE, written_whole
from ssmvl.recipes.merge import Recipe, load_recipe
from ssmvl.recipes.norm_groups import write_out


class RunFolder:
    """Paths of one run.

    Args:
        root: the folder.
        stages: names of the stages, in their order.
        checkpoints: a folder or URL under which `<run>/<stage>` has checkpoints; the run folder if None.
    """

    def __init__(self, root: Path, stages: list[str], checkpoints: str | None = None) -> None:
        self.root, self.stages, self._elsewhere = root, stages, checkpoints
        self._lock: IO[str] | None = None

    def model(self, stage: str) -> Path:
        """Where a stage leaves its model."""
        return self.root / "model" if stage == self.stages[-1] else self.root / stage / "model"

    def finished(self, stage: str) -> str:
        """The line that reports a stage as finished by an earlier launch."""
        return f"stage {stage}: finished before, {self.model(stage)}; run=NAME trains it anew in another folder"

    def checkpoints(self, stage: str) -> Path | str:
        """Where a stage's checkpoints lie: a folder, or the URL of one."""
        if self._elsewhere is None:
            return self.root / stage / "checkpoints"
        place = f"{self._elsewhere.rstrip('/')}/{self.root.name}/{stage}"
        return place if is_remote(place) else Path(place).expanduser()

    def damaged(self, stage: str) -> Path:
        """Where a stage lists samples that could not be used."""
        return self.root / stage / "damaged.jsonl"

    def traces(self, stage: str) -> Path:
        """Where a stage's profiles lie."""
        return self.root / stage / "traces"

    def logs(self, stage: str) -> Path:
        """Where a stage's TensorBoard logs lie."""
        return self.root / "tensorboard" / f"{self.root.name}-{stage}"

    def require_no_other(self, recipe: Recipe) -> None:
        """Find that the folder is this recipe's or nobody's; write nothing.

        Raises:
            RunError: it belongs to a run with another model, seed, data or trained parts.
        """
        path = self.root / "recipe.yaml"
        if not path.is_file():
            return
        found = differences(identity(load_recipe(path)), identity(recipe))
        if found:
            listed = "\n  ".join(found)
            hint = "\nssmvl 0.1 had norm_groups: 1; set it in the recipe to resume" if ".norm_groups:" in listed else ""
            raise RunError(f"{self.root} holds another run; give this one a name with run=NAME:\n  {listed}{hint}")

    def changes(self, recipe: Recipe, stage: str) -> list[str]:
        """One line for each option of a stage that was another one when the folder was claimed."""
        there = load_recipe(self.root / "recipe.yaml")
        return differences(there.data["stages"].get(stage), recipe.data["stages"].get(stage), f"stages.{stage}")

    def claim(self, recipe: Recipe) -> None:
        """Make the folder this recipe's, or find that it is; no other launch may work in it until `release`.

        Raises:
            RunError: it belongs to another run, another launch works in it, or a place in it cannot be written.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self._take()
            self.require_no_other(recipe)
            folders = [place for place in map(self.checkpoints, self.stages) if isinstance(place, Path)]
            for place in (*(self.root / stage for stage in self.stages), *folders, self.root / "tensorboard"):
                place.mkdir(parents=True, exist_ok=True)
                if not os.access(place, os.W_OK):
                    raise PermissionError(errno.EACCES, "this user may not write into it, or nobody may", str(place))
            if not (self.root / "recipe.yaml").is_file():
                self.write("recipe.yaml", recipe.to_yaml().encode())
        except OSError as error:
            self.release()
            raise RunError(f"{error.filename or self.root} cannot be written ({error})") from error
        except RunError:
            self.release()
            raise

    def require_seen(self) -> None:
        """Find that this machine sees what the first rank claimed.

        Raises:
            RunError: it does not.
        """
        folders = [place for place in map(self.checkpoints, self.stages) if isinstance(place, Path)]
        for path in (self.root / "recipe.yaml", *folders):
            if not path.exists():
                where = f"{path} is not there on {socket.gethostname()}, though the first rank has made it"
                raise RunError(f"{where}; it must lie on storage that every node sees")

    @property
    def vanished(self) -> bool:
        """Whether someone removed or moved the folder while this process works in it."""
        try:
            (self.root / "recipe.yaml").stat()
        except FileNotFoundError:
            return self._lock is not None
        except OSError:  # there, but its disk fails
            pass
        return False

    def _take(self) -> None:
        self.release()
        # Locks of this kind are not inherited by workers that outlive a killed rank, and hold between machines.
        self._lock = (self.root / ".lock").open("a+")
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                return  # a file system that has none
            self._lock.seek(0)
            owner = self._lock.read().strip()
            self.release()
            advice = "wait for it, end it, or give this one a name with run=NAME"
            raise RunError(f"{self.root} is in use by another launch ({owner}); {advice}") from error
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._lock.flush()

    def release(self) -> None:
        """Let other launches work in the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def write(self, name: str, content: bytes) -> None:
        """Write a small file whole or not at all."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with written_whole(self.root / name) as partial:
                partial.write_bytes(content)
        except OSError as error:
            raise RunError(f"{self.root / name} cannot be written ({error})") from error


def finished_stage(recipe: Recipe, stage: str) -> str:
    """The line that reports a stage as finished; empty if it is not, or if the recipe has changed since."""
    folder = RunFolder(Path("runs") / str(recipe.data["run"]), list(recipe.data["stages"]))
    saved = folder.root / "recipe.yaml"
    if not (folder.model(stage) / ABOUT_FILE).is_file() or not saved.is_file():
        return ""
    before, now = ({**write_out(one.data), "stage": None} for one in (load_recipe(saved), recipe))
    return "" if differences(before, now) else folder.finished(stage)


def identity(recipe: Recipe) -> dict[str, Any]:
    """What makes a run this one, as plain data: its model, seed and stages, of these the data and trained parts."""
    stages = {k: v for k, v in (recipe.data.get("stages") or {}).items() if isinstance(v, dict)}
    kept = {name: {key: stage.get(key) for key in ("data", "init_from", "train")} for name, stage in stages.items()}
    # Mappings are equal in any order, but encoders in another order are another model.
    order = {"order of model.encoders": list(recipe.data["model"].get("encoders") or ())}
    order["order of stages"] = list(stages)
    return {"model": write_out(recipe.data["model"]), "seed": recipe.data["seed"], "stages": kept, **order}


def differences(there: Any, here: Any, path: str = "") -> list[str]:
    """One line for each value that is another in two identities."""
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        keys = [*there, *(key for key in here if key not in there)]
        return [
            line for key in keys for line in differences(there.get(key), here.get(key), f"{path}.{key}".lstrip("."))
        ]
    return [] if _same(there, here) else [f"{path}: {there!r} there, {here!r} here"]


def _same(there: Any, here: Any) -> bool:
    """Compare scalars; a recipe of ssmvl 0.1 has 8000 where one read today has the text `8_000`."""
    return bool(
        there == here or (isinstance(there, str) != isinstance(here, str) and _resolved(there) == _resolved(here))
    )


def _resolved(value: Any) -> Any:
    """A scalar as YAML 1.1 reads it: `no` is false and `8_000` a number."""
    try:
        return OmegaConf.create(f"value: {value}").value if isinstance(value, str) else value
    except (YAMLError, OmegaConfBaseException):
        return value
