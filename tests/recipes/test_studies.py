"""Studies: how a run is judged, and where it resumes. For the rest, see the tests of the programs that use studies."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel

from recipes.studies.process import written
from recipes.studies.result import RunResult
from recipes.tune.search import value_of_kept


class Validated(BoringModel):
    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log("loss/eval", super().validation_step(batch, batch_idx)["x"])


def test_a_run_is_judged_by_the_weights_that_its_monitor_keeps(tmp_path: Path) -> None:
    """Whatever the files' names are, and whatever else is kept."""
    every, kept = ModelCheckpoint(tmp_path / "every", save_top_k=-1), ModelCheckpoint(tmp_path, monitor="epoch")
    of_run: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    sizes = {"max_epochs": 2, "limit_train_batches": 1, "limit_val_batches": 1}
    result, resumed = RunResult(str(tmp_path)), RunResult(str(tmp_path))
    L.Trainer(accelerator="cpu", callbacks=[every, kept, result], **of_run, **sizes).fit(Validated())
    fitted = written(tmp_path / "fit.json")
    assert (fitted["best"], fitted["monitor"]) == (kept.best_model_path, "epoch")
    first, last = (validation["loss/eval"] for validation in fitted["validations"])
    assert value_of_kept(fitted, "loss/eval") == first != last
    resumed.load_state_dict(result.state_dict())
    assert resumed.validations == fitted["validations"]
    assert resumed.seconds == result.seconds
    assert len(resumed.seconds) == 2
