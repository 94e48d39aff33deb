"""The policy of the heads in a folder, whichever they are."""

from autodeco_fast.autodeco.layout import CONFIG_NAME as MODEL_CONFIG_NAME
from autodeco_fast.autodeco.own_heads import OWN_FILES, holds_own
from autodeco_fast.checkpoint import CONFIG_NAME, fetch
from autodeco_fast.policies.autodeco import AutoDecoPolicy
from autodeco_fast.policies.fixed import HeadPolicy


def load_policy(name: str, what: str = "head", **options) -> HeadPolicy | AutoDecoPolicy:
    """Of a temperature head alone its T and Min-P; of AutoDeco's two heads, in this library's
    folders or a checkpoint, their T and top-p.

    Args:
        name: folder or hub id.
        what: the setting, for complaints.
        options: of the policy.

    Raises:
        ValueError: if there is no such head, or for an option out of range.
    """
    folder = fetch(name, what, (*OWN_FILES, MODEL_CONFIG_NAME))
    has_temperature, has_top_p = holds_own(folder)
    if not (has_temperature or has_top_p or (folder / MODEL_CONFIG_NAME).is_file()):
        raise ValueError(
            f"{what} must be the folder of a head or of an AutoDeco checkpoint, got {name!r}, "
            f"which has neither {CONFIG_NAME} nor {MODEL_CONFIG_NAME}"
        )
    alone = has_temperature and not has_top_p
    return (HeadPolicy if alone else AutoDecoPolicy).load(name, **options)
