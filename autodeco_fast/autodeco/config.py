"""`AutoDecoConfig`: a base model's configuration, flattened, with AutoDeco's keys beside it."""

from collections.abc import Mapping

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from autodeco_fast.autodeco import layout
from autodeco_fast.errors import foreign

# Given to a configuration but never among its values.
_PASSED = ("attn_implementation", "experts_implementation")


class AutoDecoConfig(PreTrainedConfig):
    """The configuration of an AutoDeco checkpoint.

    Attributes are those of the base model's configuration and, beside them, `base_model_type`,
    `base_model_name_or_path`, `enable_temperature_head`, `enable_top_p_head`,
    `use_enhanced_features`, `temperature_hidden_size` and `top_p_hidden_size`.

    Args:
        settings: the entries of a checkpoint's `config.json`. What the base's configuration class
            knows goes through it, so that older spellings end up as its own.

    Raises:
        ValueError: as `layout.check_config`.
    """

    model_type = layout.MODEL_TYPE

    def __init__(self, **settings):
        if settings:  # transformers compares configurations with one made of nothing
            settings["model_type"] = layout.MODEL_TYPE
            settings = layout.check_config(settings, "configuration")
            settings["architectures"] = [layout.ARCHITECTURE]
            if layout.knows_its_base(settings):
                settings = _through_its_base(settings)
            del settings["model_type"]  # the class has it
        super().__init__(**settings)

    @classmethod
    def of(cls, base: PreTrainedConfig, name: str | None, **added) -> "AutoDecoConfig":
        """Of a base model's configuration.

        Args:
            name: folder or hub id of the base model.
            added: as of `layout.flatten`; the width is by default the one that the base's
                configuration says, under whichever name.
        """
        added.setdefault("hidden_size", width_of(base))
        flat = layout.flatten(base.to_dict(), base_model_name_or_path=name, **added)
        return cls(**flat)

    def base_config(self) -> PreTrainedConfig:
        """The base model's configuration.

        Raises:
            ValueError: if it is not known whose it is, or transformers does not know the type.
        """
        config = _made(layout.base_config(self.to_dict()))
        architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
        config.architectures = None if architecture is None else [architecture]
        return config

    def added(self) -> dict:
        """What `layout.flatten` adds to the base's configuration, as its arguments."""
        return {
            "hidden_size": self.temperature_hidden_size,
            "enable_temperature_head": self.enable_temperature_head,
            "enable_top_p_head": self.enable_top_p_head,
            "use_enhanced_features": self.use_enhanced_features,
        }

    def to_diff_dict(self) -> dict:
        """What `config.json` gets: what the base's would, and AutoDeco's keys.

        transformers leaves out what equals its own defaults; they are not the base class's.
        """
        if not layout.knows_its_base(self.__dict__):
            return super().to_diff_dict()
        name = self.base_model_name_or_path
        base = self.base_config().to_diff_dict()
        return layout.flatten(base, base_model_name_or_path=name, **self.added())


def width_of(base: PreTrainedConfig) -> object:
    """Width of what enters a base's output embedding, as its configuration says it under whichever
    name; None if it does not."""
    text = base.get_text_config()
    return layout.width_of(lambda key: getattr(text, key, None))


def written_width(base: Mapping) -> object:
    """`width_of` of a `config.json`.

    Raises:
        ValueError: if it is none of its model type's.
    """
    kind = base.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        return None
    with foreign("the base model's configuration cannot be read"):
        return width_of(_made(base))


def _made(settings: Mapping) -> PreTrainedConfig:
    """The configuration of a plain model."""
    kind = settings["model_type"]
    if kind not in CONFIG_MAPPING:
        raise ValueError(f"base_model_type must be one that transformers knows, got {kind!r}")
    return CONFIG_MAPPING[kind].from_dict(settings)


def _through_its_base(settings: dict) -> dict:
    """A checkpoint's settings, the base's as its configuration class writes them."""
    plain = {name: value for name, value in settings.items() if name not in _PASSED}
    base = _made(layout.base_config(plain)).to_dict()
    own = ("architectures", *layout.CONFIG_KEYS, *_PASSED, "name_or_path")
    return {**base, **{name: settings[name] for name in own if name in settings}}
