"""The released AutoDeco format (arXiv 2510.26697, Zacks917/AutoDeco): names, keys and shapes.

A checkpoint is a folder with `config.json`, the base model's configuration flattened with a few
keys added, and safetensors files. *Heads-only* files hold the two heads alone, and the base model
is at `base_model_name_or_path`; *merged* ones hold the base too, its keys behind `llm.`. Both heads
are in a file whatever the `enable_…` flags say: those say which of them are used.

Plain dictionaries, so that files can be taken apart without building a model.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import PurePosixPath, PureWindowsPath

from autodeco_fast.values import require, text, whole

MODEL_TYPE = "autodeco"
ARCHITECTURE = "AutoDecoModelForCausalLM"

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

BASE_PREFIX = "llm."
TEMP_PREFIX = "temp_head."
TOP_P_PREFIX = "top_p_head."
HEAD_PREFIXES = (TEMP_PREFIX, TOP_P_PREFIX)

INTERMEDIATE_SIZE = 256  # of both heads; no key of the configuration
MAX_TEMPERATURE = 2.0
_WIDEST = 2**24
_FLOATS = ("F64", "F32", "F16", "BF16")  # as safetensors names dtypes

# What flattening adds to the base model's keys, in the order in which it is written.
CONFIG_KEYS = (
    "base_model_type",
    "base_model_name_or_path",
    "enable_temperature_head",
    "enable_top_p_head",
    "use_enhanced_features",
    "temperature_hidden_size",
    "top_p_hidden_size",
)
_FLAGS = ("enable_temperature_head", "enable_top_p_head", "use_enhanced_features")
# Where these differ, the base is another model of the same type.
_SIZES = ("hidden_size", "num_hidden_layers", "vocab_size")
_WIDTHS = ("temperature_hidden_size", "top_p_hidden_size")


def flatten(
    base: Mapping,
    *,
    base_model_name_or_path: str | None,
    hidden_size: int | None = None,
    enable_temperature_head: bool = True,
    enable_top_p_head: bool = True,
    use_enhanced_features: bool = True,
) -> dict:
    """The `config.json` of a checkpoint.

    Args:
        base: the base model's `config.json`.
        base_model_name_or_path: folder or hub id of the base model; None where it is in no file.
        hidden_size: width of what enters the output embedding; what `width_of` says if None.
        enable_temperature_head: whether T is predicted.
        enable_top_p_head: whether top-p is predicted.
        use_enhanced_features: whether the top-p head reads the four numbers of `prob_stats`.

    Raises:
        ValueError: if the base names no model type, is itself such a checkpoint, or has no width.
    """
    if base.get("model_type") == MODEL_TYPE:
        raise ValueError(f"the base model must be a plain one, got model_type {MODEL_TYPE!r}")
    width = width_of(base.get) if hidden_size is None else hidden_size
    config = {
        **base,
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "base_model_type": base.get("model_type"),
        "base_model_name_or_path": base_model_name_or_path,
        "enable_temperature_head": enable_temperature_head,
        "enable_top_p_head": enable_top_p_head,
        "use_enhanced_features": use_enhanced_features,
        "temperature_hidden_size": width,
        "top_p_hidden_size": width,
    }
    require(knows_its_base(config), "model_type of the base", base.get("model_type"), "a name")
    return check_config(config, "the base model's configuration")


def width_of(value: Callable[[str], object]) -> object:
    """Width of what enters a base's output embedding, as its configuration says it; None if it does
    not.

    Args:
        value: of a key of the configuration, None if it has none.
    """
    # OPT projects its hidden states to the width of its embeddings.
    return value("word_embed_proj_dim") or value("hidden_size")


def knows_its_base(config: Mapping) -> bool:
    """Whether `base_model_type` names a model type.

    The released code writes "autodeco" there once a configuration has been read and saved again;
    the base's own configuration, at `base_model_name_or_path`, is the only place to look then.
    """
    kind = config.get("base_model_type")
    return isinstance(kind, str) and kind not in ("", MODEL_TYPE)


def base_config(config: Mapping, base_model_type: str | None = None) -> dict:
    """The base model's configuration: `flatten` undone, but for `architectures`, which it lost.

    Args:
        config: a checkpoint's `config.json`.
        base_model_type: for one that no longer knows it (`knows_its_base`).

    Raises:
        ValueError: if neither names a model type.
    """
    kind = base_model_type or (config["base_model_type"] if knows_its_base(config) else None)
    came = config.get("base_model_type")
    require(kind is not None, "base_model_type", came, "the base's model type, as 'qwen2'")
    added = {*CONFIG_KEYS, "architectures", "auto_map", "_name_or_path"}
    return {**{key: config[key] for key in config if key not in added}, "model_type": kind}


def check_config(config: Mapping, where: str) -> dict:
    """The configuration with every key of `CONFIG_KEYS`, checked.

    Args:
        config: a checkpoint's `config.json`.
        where: what complaints begin with.

    Raises:
        ValueError: for another model type, flags that are none, widths that are none, or a base
            model's path that is relative and climbs out of its folder.
    """
    kind = config.get("model_type")
    if kind != MODEL_TYPE:
        raise ValueError(f"{where}: model_type must be {MODEL_TYPE!r}, got {kind!r}")
    checked = dict(config)
    for name in _FLAGS:
        value = checked.setdefault(name, True)
        require(isinstance(value, bool), f"{where}: {name}", value, "true or false")
    for name in _WIDTHS:
        width = config.get(name)
        width = config.get("hidden_size") if width is None else width
        checked[name] = whole(f"{where}: {name}", width, 1, _WIDEST)
    base = checked.setdefault("base_model_name_or_path", None)
    if base is not None:
        name = f"{where}: base_model_name_or_path"
        require(isinstance(base, str) and base != "", name, base, "a folder or hub id")
        inside = ".." not in (*PurePosixPath(text(name, base)).parts, *PureWindowsPath(base).parts)
        require(inside, name, base, "a folder or hub id without '..'")
    checked.setdefault("base_model_type", None)
    return checked


def check_base(config: Mapping, base: Mapping, where: str) -> None:
    """That heads were made for a base model, as far as configurations can say.

    Args:
        config: one that went through `check_config`.
        base: the base model's configuration.
        where: what complaints begin with.

    Raises:
        ValueError: if the base is a checkpoint itself, of another type or of other sizes.
    """
    kind, expected = base.get("model_type"), config["base_model_type"]
    if kind == MODEL_TYPE:
        raise ValueError(f"{where} is an AutoDeco checkpoint: split it first")
    if knows_its_base(config) and kind != expected:
        raise ValueError(f"{where} is of type {kind!r}, the heads were made for {expected!r}")
    for name in _SIZES:
        came, expected = base.get(name), config.get(name)
        # A configuration may leave a size to its class, or give it under an older name.
        if came is not None and expected is not None and came != expected:
            raise ValueError(f"{where} has {name} {came}, the heads were made for {expected}")


def head_shapes(config: Mapping) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of both heads' tensors, whichever of them are used; F is 256."""
    F = INTERMEDIATE_SIZE
    columns = 5 if config["use_enhanced_features"] else 1  # T, and the numbers of prob_stats
    widths = {
        TEMP_PREFIX: config["temperature_hidden_size"],
        TOP_P_PREFIX: config["top_p_hidden_size"] + columns,
    }
    return {
        f"{prefix}mlp.{name}": shape
        for prefix, width in widths.items()
        for name, shape in {
            "0.weight": (F, width),
            "0.bias": (F,),
            "2.weight": (1, F),
            "2.bias": (1,),
        }.items()
    }


def used_heads(config: Mapping) -> tuple[str, ...]:
    """The prefixes of the heads that are used."""
    temperature, top_p = config["enable_temperature_head"], config["enable_top_p_head"]
    return (TEMP_PREFIX,) * temperature + (TOP_P_PREFIX,) * top_p


def is_head(name: str) -> bool:
    """Whether a tensor is a head's."""
    return name.startswith(HEAD_PREFIXES)


def is_base(name: str) -> bool:
    """Whether a tensor is the base model's."""
    return name.startswith(BASE_PREFIX)


def check_heads(config: Mapping, tensors: Mapping[str, tuple[str, tuple[int, ...]]], where: str):
    """That the heads a configuration uses are there, and every head's tensors fit it.

    Args:
        config: one that went through `check_config`.
        tensors: dtype (as safetensors names it) and shape of every tensor of a checkpoint.
        where: what complaints begin with.

    Raises:
        ValueError: naming the first tensor that is missing, of another shape, or no floats, or that
            is neither a head's nor the base's.
    """
    expected = head_shapes(config)
    for name, shape in expected.items():
        used = name.startswith(used_heads(config))
        # A head that is not used may be left out, though not half of it.
        whole_head = name.partition(".")[0] + "."
        if name not in tensors and (used or any(n.startswith(whole_head) for n in tensors)):
            raise ValueError(f"{where}: has no tensor {name!r}, which must be {shape}")
    for name, (dtype, shape) in tensors.items():
        if is_base(name):
            continue
        if name not in expected:
            raise ValueError(
                f"{where}: tensor {name!r} is none of the heads' (temp_head.mlp…, top_p_head.mlp…) "
                f"or the base's ({BASE_PREFIX}…)"
            )
        if tuple(shape) != expected[name]:
            raise ValueError(
                f"{where}: tensor {name!r} must be {expected[name]}, got {tuple(shape)}"
            )
        require(dtype in _FLOATS, f"{where}: dtype of {name!r}", dtype, " or ".join(_FLOATS))


def is_merged(names: Iterable[str]) -> bool:
    """Whether a checkpoint with these tensors holds its base model."""
    return any(map(is_base, names))


def check_index(index: object, where: str) -> dict[str, str]:
    """The file of every tensor, from `model.safetensors.index.json`.

    Raises:
        ValueError: if it is no index, or a file's name is a path: files lie beside their index.
    """
    files = index.get("weight_map") if isinstance(index, Mapping) else None
    if not isinstance(files, Mapping) or not files:
        raise ValueError(f"{where}: must hold a weight_map, got none")
    for file in files.values():
        plain = isinstance(file, str) and file.endswith(".safetensors") and _is_plain(file)
        require(plain, f"{where}: a file", file, "the name of a safetensors file beside it")
    return dict(files)


def _is_plain(file: str) -> bool:
    paths = PurePosixPath(file), PureWindowsPath(file)
    return all(path.parts == (file,) for path in paths) and "\0" not in file
