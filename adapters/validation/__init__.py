"""The nineteen checks that an adapter passes before it is kept or served; the same code in the hub and offline.

    code          finds                                                       level
    E_PATH        names that some file system cannot hold or takes elsewhere  reject
    E_PICKLE      pickles, by name and by content                             reject
    E_CODE        code, `auto_map`; tokenizer files and templates             reject; warn
    E_SIZE        too many files, files or trees over the limits              reject
    E_ST_HEADER   a safetensors header that two readers could take two ways   reject
    E_ST_NAMES    tensor names that are paths                                 reject
    E_EMPTY       no tensors, empty tensors, a file under 1 KiB               reject
    E_CFG         adapter_config.json that PEFT would not take                reject
    E_IMPORT      a config that makes PEFT import a module                    reject
    E_LOCALPATH   a base that is a path on somebody's disk                    reject
    E_AB          A and B that do not fit each other or the config's rank     reject
    E_TARGETS     tensors outside the targets, targets without tensors        reject
    E_BASE_SHAPE  shapes that the base does not have                          reject, when the base is known
    E_BASE_PIN    no or another base than pinned                              warn or reject, by policy
    E_NONFINITE   NaN and infinities                                          reject
    W_ZERO_B      an adapter that changes nothing                             warn
    W_NORM        a change far out of scale                                   warn
    W_SERVE       features that serving engines do not take                   warn
    W_CARD        a card without base, license or data                        warn

Refuses to know HTTP, databases and where files are kept.
"""

from loractl.adapters.validation.base_shapes import BaseShapes, shapes_from_config, shapes_from_folder
from loractl.adapters.validation.preupload import check_preupload
from loractl.adapters.validation.record import VALIDATOR_VERSION, Finding, Level, Policy, ValidationRecord
from loractl.adapters.validation.tree import FileTree, FolderTree, MemoryTree
from loractl.adapters.validation.validate import validate_tree

__all__ = [
    "VALIDATOR_VERSION",
    "BaseShapes",
    "FileTree",
    "Finding",
    "FolderTree",
    "Level",
    "MemoryTree",
    "Policy",
    "ValidationRecord",
    "check_preupload",
    "shapes_from_config",
    "shapes_from_folder",
    "validate_tree",
]
