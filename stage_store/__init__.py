"""Stage cache: results by key, on a local disk or in S3, committed at once, computed once."""

from stage_store.checkpoints import Checkpoints
from stage_store.errors import CorruptStage, StoreError
from stage_store.fingerprint import code_hash, code_modules, fingerprint_file, stage_key
from stage_store.manifest import SCHEMA, Manifest
from stage_store.refs import StageRef
from stage_store.store import Store

__all__ = [
    "SCHEMA",
    "Checkpoints",
    "CorruptStage",
    "Manifest",
    "StageRef",
    "Store",
    "StoreError",
    "code_hash",
    "code_modules",
    "fingerprint_file",
    "stage_key",
]
