"""Run folder: ownership and layout.

runs/<run>/recipe.yaml        the resolved recipe, which identifies the run
runs/<run>/<stage>/           checkpoints/ (for resuming only), model/ (the stage's model, where the next stage starts),
                              damaged.jsonl (samples that were replaced), traces/ (profiles)
runs/<run>/model/             the last stage's model: `ssmvl.load("runs/<run>")`
runs/<run>/tensorboard/       logs
runs/<run>/.lock              held by the running launch, which it names
runs/<run>/results.json, answers.png, curves.png
runs/<run>/example.png        a test image
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
        root: the run folder.
        stages: names of the stages, in order.
        checkpoints: a directory or URL under which `<run>/<stage>` holds checkpoints; the run folder if None.
    """

    def __init__(self, root: Path, stages: list[str], checkpoints: str | None = None) -> None:
        self.root, self.stages, self._elsewhere = root, stages, checkpoints
        self._lock: IO[str] | None = None

    def model(self, stage: str) -> Path:
        """The directory of a stage's saved model."""
        return self.root / "model" if stage == self.stages[-1] else self.root / stage / "model"

    def is_finished(self, stage: str) -> bool:
        """Return True if the stage's model is saved."""
        return (self.model(stage) / ABOUT_FILE).is_file()

    def finished(self, stage: str) -> str:
        """The line that reports a stage as finished by an earlier launch."""
        return (
            f"stage {stage}: already finished ({self.model(stage)}); to train it again, start a new run with run=NAME"
        )

    def is_extended(self, recipe: Recipe, stage: str) -> bool:
        """Return True if the recipe raises the duration of a finished stage, which then resumes.

        Raises:
            RunError: another option of the stage has changed.
        """
        saved = (load_recipe(self.model(stage) / "recipe.yaml").data.get("stages") or {}).get(stage) or {}
        now = recipe.data["stages"][stage]
        changes = differences(saved, now, f"stages.{stage}")
        if not changes:
            return False
        others = differences({**saved, "duration": now["duration"]}, now)
        if _is_longer(now["duration"], saved.get("duration", "")) and not others:
            return True
        listed = "\n  ".join(changes)
        advice = "Undo the change, raise only its duration to train it further, or start a new run with run=NAME"
        raise RunError(f"stage {stage} is finished, so its options cannot change:\n  {listed}\n{advice}")

    def checkpoints(self, stage: str) -> Path | str:
        """The directory or URL of a stage's checkpoints."""
        if self._elsewhere is None:
            return self.root / stage / "checkpoints"
        path = f"{self._elsewhere.rstrip('/')}/{self.root.name}/{stage}"
        return path if is_remote(path) else Path(path).expanduser()

    def damaged(self, stage: str) -> Path:
        """The file that lists a stage's damaged samples."""
        return self.root / stage / "damaged.jsonl"

    def traces(self, stage: str) -> Path:
        """The directory of a stage's profiles."""
        return self.root / stage / "traces"

    def logs(self, stage: str) -> Path:
        """The directory of a stage's TensorBoard logs."""
        return self.root / "tensorboard" / f"{self.root.name}-{stage}"

    def require_no_other(self, recipe: Recipe) -> None:
        """Check that the run folder is unclaimed or belongs to this recipe. Writes nothing.

        Raises:
            RunError: it belongs to a run with a different model, seed, data or trained parts.
        """
        path = self.root / "recipe.yaml"
        if not path.is_file():
            return
        changes = differences(identity(load_recipe(path)), identity(recipe))
        if changes:
            listed = "\n  ".join(changes)
            hint = "\nssmvl 0.1 had norm_groups: 1; set it in the recipe to resume" if ".norm_groups:" in listed else ""
            raise RunError(f"{self.root} belongs to a different run; name this one with run=NAME:\n  {listed}{hint}")

    def changes(self, recipe: Recipe, stage: str) -> list[str]:
        """One line for each option of a stage that has changed since the run folder was claimed."""
        claimed = load_recipe(self.root / "recipe.yaml")
        return differences(claimed.data["stages"].get(stage), recipe.data["stages"].get(stage), f"stages.{stage}")

    def claim(self, recipe: Recipe) -> None:
        """Claim the run folder for this recipe. No other launch may use it until `release`.

        Raises:
            RunError: it belongs to a different run, another launch is using it, or it cannot be written.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self._take()
            self.require_no_other(recipe)
            checkpoints = [path for path in map(self.checkpoints, self.stages) if isinstance(path, Path)]
            for path in (*(self.root / stage for stage in self.stages), *checkpoints, self.root / "tensorboard"):
                path.mkdir(parents=True, exist_ok=True)
                if not os.access(path, os.W_OK):
                    raise PermissionError(errno.EACCES, "no write permission", str(path))
            if not (self.root / "recipe.yaml").is_file():
                self.write("recipe.yaml", recipe.to_yaml().encode())
        except OSError as error:
            self.release()
            raise RunError(f"{error.filename or self.root} cannot be written ({error})") from error
        except RunError:
            self.release()
            raise

    def require_seen(self) -> None:
        """Check that this machine sees the run folder that the first rank claimed.

        Raises:
            RunError: it does not.
        """
        checkpoints = [path for path in map(self.checkpoints, self.stages) if isinstance(path, Path)]
        for path in (self.root / "recipe.yaml", *checkpoints):
            if not path.exists():
                what = f"{path} does not exist on {socket.gethostname()}, although the first rank created it"
                raise RunError(f"{what}; run folder and checkpoints must be on storage shared by all nodes")

    @property
    def vanished(self) -> bool:
        """True if the run folder was removed or moved while this process is using it."""
        try:
            (self.root / "recipe.yaml").stat()
        except FileNotFoundError:
            return self._lock is not None
        except OSError:  # it exists, but its disk fails
            pass
        return False

    def _take(self) -> None:
        self.release()
        # Loader workers that outlive a killed rank do not inherit such a lock, and it holds across machines.
        self._lock = (self.root / ".lock").open("a+")
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                return  # a file system without locks
            self._lock.seek(0)
            owner = self._lock.read().strip()
            self.release()
            advice = "wait for it, stop it, or name this run with run=NAME"
            raise RunError(f"{self.root} is in use by another launch ({owner}); {advice}") from error
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._lock.flush()

    def release(self) -> None:
        """Let other launches use the run folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def write(self, name: str, content: bytes) -> None:
        """Write a small file atomically."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with written_whole(self.root / name) as partial:
                partial.write_bytes(content)
        except OSError as error:
            raise RunError(f"{self.root / name} cannot be written ({error})") from error


def finished_stage(recipe: Recipe, stage: str) -> str:
    """The line that reports a stage as finished; empty if it is not, or if the recipe has changed."""
    folder = RunFolder(Path("runs") / str(recipe.data["run"]), list(recipe.data["stages"]))
    saved = folder.root / "recipe.yaml"
    if not folder.is_finished(stage) or not saved.is_file():
        return ""
    before, now = ({**write_out(one.data), "stage": None} for one in (load_recipe(saved), recipe))
    return "" if differences(before, now) else folder.finished(stage)


def identity(recipe: Recipe) -> dict[str, Any]:
    """The identity of a run as plain data: model, seed, and each stage's data, start and trained parts."""
    stages = {k: v for k, v in (recipe.data.get("stages") or {}).items() if isinstance(v, dict)}
    kept = {name: {key: stage.get(key) for key in ("data", "init_from", "train")} for name, stage in stages.items()}
    # Mappings compare equal in any order, but the order of encoders changes the model.
    order = {"order of model.encoders": list(recipe.data["model"].get("encoders") or ())}
    order["order of stages"] = list(stages)
    return {"model": write_out(recipe.data["model"]), "seed": recipe.data["seed"], "stages": kept, **order}


def differences(before: Any, now: Any, path: str = "") -> list[str]:
    """One line for each value that differs."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        keys = [*before, *(key for key in now if key not in before)]
        return [
            line for key in keys for line in differences(before.get(key), now.get(key), f"{path}.{key}".lstrip("."))
        ]
    return [] if _same(before, now) else [f"{path}: was {before!r}, is now {now!r}"]


def _is_longer(duration: str, than: str) -> bool:
    """Compare two durations; False if their units differ."""
    unit = duration.lstrip("0123456789")
    return than.endswith(unit) and int(duration.removesuffix(unit)) > int(than.removesuffix(unit) or 0)


def _same(before: Any, now: Any) -> bool:
    """Compare scalars. Recipes saved by ssmvl 0.1 have 8000 where a recipe read today has the text `8_000`."""
    return bool(
        before == now or (isinstance(before, str) != isinstance(now, str) and _resolved(before) == _resolved(now))
    )


def _resolved(value: Any) -> Any:
    """A scalar as YAML 1.1 reads it: `no` is false and `8_000` a number."""
    try:
        return OmegaConf.create(f"value: {value}").value if isinstance(value, str) else value
    except (YAMLError, OmegaConfBaseException):
        return value
