"""Which model a run starts from, for every recipe."""

from __future__ import annotations

from pathlib import Path

from rstar.config import ModelSection


def base_model(section: ModelSection, run: Path, *, seed: int = 0) -> str:
    """Folder or hub id of the model that `model.base` names; checked, converted or built where it is ours to make.

    "smollm2" is converted once into the cache folder, "tiny" is built in the run's folder.
    """
    from rstar.tokens import check_model_folder

    match section.base:
        case "smollm2":
            from rstar.training.models import cache_folder, smollm2_checkpoint

            folder = cache_folder()
            if not any(folder.glob("*")):
                print("converting SmolLM2-135M-Instruct to a plain checkpoint (once, half a minute)", flush=True)
            return str(smollm2_checkpoint(folder))
        case "tiny":
            from rstar.training.tiny import build_tiny_model

            folder = run / "tiny_model"
            return str(folder if folder.exists() else build_tiny_model(folder, seed=seed))
        case path_or_id:
            if Path(path_or_id).exists() or path_or_id.startswith((".", "/", "~")):
                check_model_folder(Path(path_or_id).expanduser())
                return str(Path(path_or_id).expanduser())
            return path_or_id


def absolute(path_or_id: str) -> str:
    """Workers run in another folder: local paths travel absolute, hub ids as they are."""
    return str(Path(path_or_id).resolve()) if Path(path_or_id).exists() else path_or_id
