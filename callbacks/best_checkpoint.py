"""Keeps the state that validation has found best."""

from pathlib import Path
from typing import Any

from pytorch_lightning.callbacks import ModelCheckpoint


class BestCheckpoint(ModelCheckpoint):
    """Writes ``best.ckpt`` after every validation that is better than all before it.

    Lightning's ``ModelCheckpoint`` forgets what was best when training goes on in a folder that was moved meanwhile, or
    from another working directory, and would put the next state in its place, however bad.

    Args:
        folder: Where the file goes.
        monitor: The metric that is to be small.
    """

    def __init__(self, folder: Path, monitor: str) -> None:
        super().__init__(dirpath=folder, filename="best", monitor=monitor, enable_version_counter=False)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with what is best so far."""

        def here(path: str) -> str:
            return str(Path(str(self.dirpath), Path(path).name)) if path else path

        paths = {name: here(state_dict[name]) for name in ("best_model_path", "kth_best_model_path", "last_model_path")}
        best = {here(path): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict(state_dict | paths | {"dirpath": self.dirpath, "best_k_models": best})
