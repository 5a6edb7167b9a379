"""Where each artefact of a run lies in its folder."""

from __future__ import annotations

from pathlib import Path

PRECONDITIONERS = "preconditioners"


class RunPaths:
    """The paths of a run folder; nothing needs to be there.

    Feature stores are not among them: `RunFolder.features` names them, since a config may put them
    elsewhere.

    Attributes:
        path: The folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def record_file(self) -> Path:
        """run.json: the resolved config and the state of each stage."""
        return self.path / "run.json"

    @property
    def lock_file(self) -> Path:
        """.lock: held by the process that works in the folder."""
        return self.path / ".lock"

    @property
    def progress_file(self) -> Path:
        """.progress.json: how far the stage is that runs, or that was stopped."""
        return self.path / ".progress.json"

    @property
    def logs(self) -> Path:
        """logs/: one log per worker."""
        return self.path / "logs"

    def data(self, split: str) -> Path:
        """data/<split>.parquet."""
        return self.path / "data" / f"{split}.parquet"

    def model(self, model: str) -> Path:
        """models/<model>/: the checkpoints of `full` or `sparse`."""
        return self.path / "models" / model

    def subnetwork(
        self, language: str, seed: int | None = None, threshold: float | None = None
    ) -> Path:
        """subnetworks/<language>.json, or the file of one seed or of another threshold."""
        folder = self.path / "subnetworks"
        if seed is not None:
            folder /= f"seeds/{seed}"
        if threshold is not None:
            folder /= f"thresholds/{threshold}"
        return folder / f"{language}.json"

    def pruned_model(self, seed: int, language: str | None) -> Path:
        """subnetworks/models/<language or all>/seed-<seed>/: a model trained only to be pruned."""
        return self.path / "subnetworks" / "models" / (language or "all") / f"seed-{seed}"

    def preconditioner(self, model: str, epoch: int) -> Path:
        """preconditioners/<model>/checkpoint-<epoch>.safetensors: a fitted preconditioner."""
        return self.path / PRECONDITIONERS / model / f"checkpoint-{epoch}.safetensors"

    def influence(self, model: str, view: str) -> Path:
        """influence/<model>/<view>/: the tables of one view."""
        return self.path / "influence" / model / view

    @property
    def progress(self) -> Path:
        """influence/progress/: finished parts of the stage `influence` while it runs."""
        return self.path / "influence" / "progress"

    @property
    def blocks(self) -> Path:
        """influence/blocks/: influence by head and layer, one file per checkpoint and mask."""
        return self.path / "influence" / "blocks"

    @property
    def exact_sample(self) -> Path:
        """influence/fidelity.parquet: exact and projected scores of the sampled pairs."""
        return self.path / "influence" / "fidelity.parquet"

    @property
    def analysis(self) -> Path:
        """analysis/: comparisons, intervals and tests."""
        return self.path / "analysis"

    @property
    def retraining(self) -> Path:
        """retraining/: models trained without some examples, and how scores compare with them."""
        return self.path / "retraining"

    @property
    def metagradient(self) -> Path:
        """metagradient/: derivatives of test losses with respect to training weights."""
        return self.path / "metagradient"
