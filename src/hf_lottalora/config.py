"""`LottaLoraConfig`: a `LoraConfig` over a backbone that is a seed. Each field is documented once, here."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Protocol, get_type_hints

import torch
from peft import LoraConfig
from peft.utils import PeftType
from torch import nn

from .options import (
    AdapterSource,
    BasesShared,
    Embeddings,
    Head,
    Magnitude,
    Redraw,
    SaveDtype,
    TrainOrFrozen,
    check_adapter,
    check_biases,
    check_format,
    check_patterns,
    check_refused,
    check_scale,
    check_token_indices,
    check_types,
)
from .recorded import Recorded
from .residency.forms import Residency, check_residency
from .scaffold.draw import GENERATOR, check_seed
from .scaffold.families import get_family


class ArtifactFiles(Protocol):
    """What `artifact` does with the files beside a config."""

    def check_present(self, path: str | os.PathLike[str], subfolder: str | None) -> None:
        """Before a config is read."""

    def pinned(self, path: str | os.PathLike[str], subfolder: str | None, **hub: Any) -> dict[str, Any]:
        """Before one is read: the hub's options, for one commit."""

    def check_artifact_files(
        self, config: LottaLoraConfig, path: str | os.PathLike[str], subfolder: str | None, **hub: Any
    ) -> None:
        """Before a config that was read is used."""

    def current(self, folder: Path, name: str) -> Path:
        """The file of that name which belongs to the weights in the folder."""

    def whole(self, load: Callable[[], Any], path: str | os.PathLike[str], subfolder: str | None) -> Any:
        """What is loaded from a folder that may be written at the same time."""

    def check_not_pickled(self, folder: str | os.PathLike[str]) -> None:
        """Before a config is written."""

    def complete_artifact(self, plan: Any, folder: str | os.PathLike[str], dtype: torch.dtype | None) -> None:
        """After a config was written."""


# Puts itself in here when it is imported: it stands above this file, which imports nothing of it.
artifact_files: ArtifactFiles = None  # type: ignore[assignment]


@dataclass
class LottaLoraConfig(Recorded):
    """Configuration of a LottaLoRA adapter: `h = beta * W_seed h + scaling * B A h` (paper section 1).

    Takes `LoraConfig`'s fields (`r`, `target_modules`, `lora_alpha`, `lora_dropout`, `use_rslora`, `rank_pattern`,
    `alpha_pattern`, `modules_to_save`, `exclude_modules`, `layers_to_transform`, `task_type`, ...) and those below.
    Without `target_modules`, the attention projections of the architecture carry adapters.

    Raises:
        TypeError: `seed` or `adapter_seed` is missing or not an integer.
        ValueError: a value is of another type or out of range, or an option makes no sense over a random scaffold; the
            message names it.

    Example:
        >>> from hf_lottalora import LottaLoraConfig
        >>> LottaLoraConfig(seed=42, r=8).family
        'normal'
    """

    seed: int | None = field(
        default=None,
        metadata={"help": "Seed of the scaffold, 0 <= seed < 2**64. Required: with the names, it is the backbone."},
    )
    adapter_seed: int | None = field(
        default=None,
        metadata={"help": "Seed of the initial A and B, trained embeddings and head. Default: `seed` (ours)."},
    )
    family: str = field(
        default="normal",
        metadata={
            "help": "Distribution of the scaffold: the paper's 22 (section 2), ternary, zero, or one made known by "
            "`register_family`; `hf_lottalora.FAMILIES` lists them. Zero is the ablation: give it "
            "init_lora_weights=False, or W = 0 and B = 0 pass no gradient on."
        },
    )
    scale: str | float | None = field(
        default=None,
        metadata={
            "help": "Standard deviation of a drawn matrix: 'fan_in' = 1/sqrt(d_in) (paper section 1), 'kaiming' (a = "
            "sqrt(5)), 'xavier' (gain 1), 'initializer_range' = the architecture's own, or a positive number. Default: "
            "the family's own rule, fan_in for most. Orthogonal and spectral_radius have a gain, 1 by default. "
            "Embeddings use the architecture's."
        },
    )
    redraw: Redraw = field(
        default="all",
        metadata={
            "help": "What is drawn from the seed. 'all': every backbone matrix, nothing pretrained survives (default). "
            "'targets': the adapted matrices only, noise on a pretrained network (paper section 1, ViT). 'none': "
            "nothing, LoRA with beta."
        },
    )
    lora_alpha: float | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "B A is scaled by lora_alpha / r. Default: 8 for LoRA, as in PEFT; 20 r for RandLoRA, as PEFT "
            "documents, so that the factor is 20 (the paper has 2 / sqrt(n), n = ceil(min(d_in, d_out) / r)); r for "
            "NOLA, a factor of 1."
        },
    )
    adapter: AdapterSource = field(
        default="lora",
        metadata={
            "help": "Where A and B come from: 'lora' trains them. 'randlora' (arXiv 2502.00987) makes an update of "
            "full rank of random bases of rank r and trains n (r + d) numbers, n = ceil(d / r), d = min(d_in, d_out): "
            "a larger r trains less. 'nola' (arXiv 2310.02556) combines A and B from random ones and trains "
            "2 `bases` numbers. Bases are drawn from the adapter seed and never saved."
        },
    )
    bases: int | None = field(
        default=None, metadata={"help": "NOLA: how many random matrices A and B are combined from (256)."}
    )
    basis_family: str | None = field(
        default=None,
        metadata={"help": "RandLoRA, NOLA: distribution of the bases ('uniform'); 'binary' is drawn fastest."},
    )
    bases_shared: BasesShared | None = field(
        default=None,
        metadata={
            "help": "NOLA: whether all layers whose A (or B) is of one size share its bases ('shape', the default: "
            "each is drawn once), or each layer has its own ('layer', as in the paper)."
        },
    )
    embeddings: Embeddings = field(
        default="train",
        metadata={
            "help": "Token, position and type embeddings: 'train' whole (default, paper section 5), 'frozen' as drawn, "
            "or 'lora' = the token embedding frozen with an adapter, the smaller tables trained whole. A tied head "
            "follows. Those that target_modules or trainable_token_indices name are frozen, but for adapter and rows."
        },
    )
    head: Head | None = field(
        default=None,
        metadata={
            "help": "Task or language-model head: 'train' whole, 'lora' = drawn, frozen and adapted, or 'lora_bias' = "
            "the same with its bias trained. Default: 'train', and for a head tied to the embeddings whatever "
            "`embeddings` says. A plain nn.Module: name the head in modules_to_save, or in target_modules, and with "
            "'head.bias' in modules_to_save its bias is trained."
        },
    )
    norms: TrainOrFrozen = field(
        default="train", metadata={"help": "Normalisation layers: 'train' (default, paper section 1) or 'frozen'."}
    )
    layer_norm: bool = field(
        default=False,
        metadata={
            "help": "A trained LayerNorm on the output of each adapted linear layer, before the nonlinearity (paper "
            "section 1). Such an adapter cannot be merged."
        },
    )
    residual: bool = field(
        default=False,
        metadata={"help": "Add its input to the output of each adapted layer that keeps its shape (paper section 1)."},
    )
    dora_magnitude: Magnitude = field(
        default="outputs",
        metadata={
            "help": "With use_dora: a magnitude per row of the weight ('outputs', as in PEFT) or per column ('inputs', "
            "as the DoRA paper's column norms can be read). A batch norm after the layer undoes the first."
        },
    )
    biases: TrainOrFrozen = field(
        default="frozen",
        metadata={
            "help": "Biases of linear and convolution layers: 'frozen' (default, ours) or 'train'. LoRA's `bias` says "
            "it in another way: 'all', those of norms included, or 'lora_only', those of adapted layers."
        },
    )
    train_beta: bool = field(
        default=True, metadata={"help": "Train beta (default, paper section 1); otherwise it stays 1."}
    )
    decay_beta: bool = field(
        default=False,
        metadata={
            "help": "Whether Trainer, and `parameter_groups`, apply weight decay to beta, and with it to DoRA's "
            "magnitudes and the weights of layer_norm (default ours: not; decay pulls beta to 0, where the scaffold is "
            "silent). The paper's setting, read literally, and that of version 0.1, is True: to resume a Trainer "
            "checkpoint of 0.1 with its optimizer, pass it. With another value than the checkpoint's, torch says that "
            "a parameter group doesn't match the size of the optimizer's group."
        },
    )
    family_pattern: dict[str, str] = field(
        default_factory=dict,
        metadata={
            "help": "Other families by module, such as {'mlp.*': 'binary'}: names or regular expressions for the end "
            "of a module's path, as in rank_pattern."
        },
    )
    seed_pattern: dict[str, int] = field(
        default_factory=dict,
        metadata={"help": "Offsets that are added to the seed by module (modulo 2**64), matched as family_pattern."},
    )
    train_beta_pattern: dict[str, bool] = field(
        default_factory=dict, metadata={"help": "Exceptions to train_beta by module, matched as family_pattern."}
    )
    residency: Residency = field(
        default="dense",
        metadata={
            "help": "Where the frozen scaffold is: 'dense' in memory, 'packed' as its random words, k bits a weight, "
            "'int4' as codes of torch's int4 kernel on CPUs (binary and ternary families, fastest decoding), "
            "'streamed' nowhere: drawn at each use. The values are the same to the bit; "
            "`model.set_residency(...)` switches, for saving too. The first adapter's counts."
        },
    )
    save_kept: bool = field(
        default=False,
        metadata={
            "help": "With redraw 'targets' or 'none': write the pretrained tensors that were kept into the artifact, "
            "so that it needs no base model. With redraw 'all' they are always written, they are small."
        },
    )
    save_dtype: SaveDtype | None = field(
        default=None,
        metadata={
            "help": "How files hold what is trained: as it is (default), in 'float16', 'bfloat16' or 'int8', 8-bit "
            "codes of A, B and trained matrices, with a scale for each of the r directions or for each row, and norms, "
            "biases and magnitudes in float16 (ours). Beta, what is kept, and whatever would not become smaller stay "
            "exact. The model card and `saving_loss` say what is lost. It counts whenever the model is saved, in a "
            "Trainer's checkpoints too: to resume those exactly, set it when training is over, "
            "`model.peft_config['default'].save_dtype = 'int8'`."
        },
    )
    format_version: int | None = field(
        default=None, metadata={"help": "Scaffold format, filled in. A file without one, or a newer one, is refused."}
    )
    generator: str = field(default=GENERATOR, metadata={"help": "The random bit generator, filled in."})
    lottalora_version: str | None = field(
        default=None, metadata={"help": "hf_lottalora version that wrote the file, filled in."}
    )
    resolved_targets: list[str] | None = field(
        default=None,
        metadata={
            "help": "Paths of the layers that carry adapters; written on save. A file that has them means these, "
            "whatever target_modules would mean in a later version; beside options that were changed to mean other "
            "layers it is refused, and `dataclasses.replace(config, resolved_targets=None)` chooses anew."
        },
    )
    scaffold_digests: dict[str, str] | None = field(
        default=None,
        metadata={"help": "Digest of each drawn tensor by canonical name; written on save, checked on load."},
    )
    kept_digests: dict[str, str] | None = field(
        default=None,
        metadata={"help": "Digest of each pretrained tensor the artifact does not contain; checked on load."},
    )
    padding_rows: dict[str, int] | None = field(
        default=None,
        metadata={
            "help": "Rows of drawn tables that are zero, by canonical name; written on save, since a pad_token_id that "
            "is set after the model was built (TRL does) would make another row zero when config.json is built."
        },
    )
    other_dtypes: dict[str, str] | None = field(
        default=None,
        metadata={
            "help": "Dtypes of tensors that differ from the model's, such as buffers after `model.half()`; filled in."
        },
    )

    def __post_init__(self) -> None:
        from_file = getattr(self, "peft_type", None) is not None
        self.trainable_token_indices = self.token_indices
        self._fill_alpha()
        self._check_types()
        for name in ("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern"):
            if isinstance(value := getattr(self, name), (set, tuple)):  # PEFT knows lists, and makes sets of some
                setattr(self, name, sorted(value) if isinstance(value, set) else list(value))
        self._fill_bases()
        super().__post_init__()
        self.peft_type = PeftType.LOTTALORA  # type: ignore[attr-defined]
        # Set when the config is used and when its adapter's tensors are collected; read when it is saved.
        self._plan: Any = None
        self._custom_modules = {nn.Module: _refuse_lora_tuner}  # asked by PEFT's LoraModel, not by ours
        self._artifact_shapes: dict[str, tuple[int, ...]] | None = None
        self._artifact_manifest: dict[str, Any] | None = None
        self._artifact_architecture: str | None = None  # path of its config.json
        self.frozen_by_file = False  # whether nothing but a file says inference_mode=True
        self._choice_read: Any = None  # what said which layers, of a config that a file was read for
        self._artifact_commit: tuple[str, str] | None = None  # the hub repository it was just read from, and of which
        self._values_follow = False  # a file has them, so no starting values are drawn
        self._saved_dtype: torch.dtype | None = None
        self._stored: dict[str, Any] | None = None  # how the file held its tensors, of an adapter that was loaded
        self._other_dtypes: dict[str, str] = {}
        self.format_version = check_format(self.format_version, self.generator, from_file)
        if self.seed is None:
            raise TypeError(
                "LottaLoraConfig needs a seed: the backbone is drawn from it. Pass for example seed=42."
                if not from_file
                else "The adapter_config.json has no 'seed', so the backbone cannot be drawn. The file is damaged or "
                "not a LottaLoRA artifact."
            )
        self.seed = check_seed(self.seed)
        if self.adapter_seed is not None:
            self.adapter_seed = check_seed(self.adapter_seed, "adapter_seed")
        if self.scale is None:
            self.scale = get_family(self.family).scale_rule
        self.check()
        if self.family == "zero" and self.init_lora_weights is True and not from_file:
            warnings.warn(
                "family='zero' with B = 0 passes nothing on, and no gradient back: most adapters will not learn. Pass "
                "init_lora_weights=False, which starts A and B at random.",
                UserWarning,
                stacklevel=4,
            )

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "inference_mode":  # said anew, by a user or, of an adapter that it loads, by PEFT
            self.__dict__["frozen_by_file"] = False
        super().__setattr__(name, value)

    def _fill_alpha(self) -> None:
        if self.lora_alpha is None:
            r = self.r if type(self.r) is int else 8  # else it is refused next
            factors = {"randlora": 20 * r, "nola": r}
            self.lora_alpha = factors.get(self.adapter, 8) if isinstance(self.adapter, str) else 8

    def _fill_bases(self) -> None:
        """Defaults of what the kind of adapter takes, so that files have them."""
        defaults: dict[str, Any] = {} if self.adapter == "lora" else {"basis_family": "uniform"}
        defaults |= {"bases": 256, "bases_shared": "shape"} if self.adapter == "nola" else {}
        for name, value in defaults.items():
            if getattr(self, name) is None:
                setattr(self, name, value)

    def _check_types(self) -> dict[str, Any]:
        values = {option.name: getattr(self, option.name) for option in dataclasses.fields(self)}
        check_refused(values)
        check_types(values, _hints())
        return values

    def check(self) -> None:
        """Whether all fields fit, alone and together: when a config is made, and again when it is used.

        Raises:
            TypeError, ValueError: as the class.
        """
        values = self._check_types()
        check_seed(self.seed)
        check_seed(self.effective_adapter_seed, "adapter_seed")
        check_scale(values)
        check_patterns(values)
        check_biases(values)
        check_adapter(values)
        check_token_indices(self.token_indices)
        check_residency(self.residency, {self.family, *self.family_pattern.values()})
        extras = [name for name in ("layer_norm", "residual") if getattr(self, name)]
        if extras and self.embeddings == "lora":
            raise ValueError(f"{', '.join(extras)} is for layers that multiply, not for embeddings='lora'.")
        if self.dora_magnitude != "outputs" and not self.use_dora:
            raise ValueError(f"dora_magnitude={self.dora_magnitude!r} needs use_dora=True.")

    @property
    def effective_adapter_seed(self) -> int:
        """The seed of everything trained: `adapter_seed`, or `seed` where that is None."""
        return self.seed if self.adapter_seed is None else self.adapter_seed  # type: ignore[return-value]

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], subfolder: str | None = None, **kwargs: Any
    ) -> LottaLoraConfig:
        """Load `adapter_config.json` after checking that the weights beside it belong to it.

        Raises:
            ValueError: no seed or format version, a newer format, an unknown field, a file that is damaged, missing or
                no file, pickled weights, or those of another seed. Nothing has been changed by then.
            OSError: the hub could not be asked, or refused; the message says what happened.
        """
        path = pretrained_model_name_or_path
        kwargs |= artifact_files.pinned(path, subfolder, **kwargs)
        load = super().from_pretrained

        def checked() -> Any:
            artifact_files.check_present(path, subfolder)
            config = load(path, subfolder, **kwargs)
            if isinstance(config, cls):
                config._choice_read, config.frozen_by_file = config._choice(), config.inference_mode
                artifact_files.check_artifact_files(config, path, subfolder, **kwargs)
                commit = kwargs.get("revision")
                config._artifact_commit = (str(path), commit) if commit else None
            return config

        return artifact_files.whole(checked, path, subfolder)  # type: ignore[no-any-return]

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> Any:
        """As PEFT's; where a save was cut short, of the file that belongs to the weights."""
        file = Path(path_json_file)
        return super().from_json_file(str(artifact_files.current(file.parent, file.name)), **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write `adapter_config.json`; called last by `PeftModel.save_pretrained`, it also completes the artifact
        (`config.json`, model card).

        Raises:
            ValueError: there are pickled weights in the folder.
        """
        artifact_files.check_not_pickled(save_directory)
        if self.redraw == "all":
            self.base_model_name_or_path = None  # nothing of it survives
        saved = dataclasses.replace(self.as_saved(), lottalora_version=_package_version())
        LoraConfig.save_pretrained(saved, str(save_directory), **kwargs)
        if self._plan is not None:
            artifact_files.complete_artifact(self._plan, save_directory, self._saved_dtype)


def _refuse_lora_tuner(*args: Any, **kwargs: Any) -> nn.Module:
    raise ValueError(
        "A LottaLoRA adapter was given to PEFT's LoRA tuner, which draws no scaffold. Use get_peft_model, or "
        "PeftModel.from_pretrained for an artifact."
    )


@cache
def _hints() -> dict[str, Any]:
    return get_type_hints(LottaLoraConfig)


def _field_list() -> str:
    own = {field.name: field for field in dataclasses.fields(LottaLoraConfig)}
    names = [name for name in LottaLoraConfig.__annotations__ if name in own]
    return "\n".join(f"    {name}: {own[name].metadata['help']}" for name in names)


LottaLoraConfig.__doc__ = f"{LottaLoraConfig.__doc__}\nFields besides those of `LoraConfig`:\n{_field_list()}\n"


def _package_version() -> str:
    from importlib.metadata import version

    return version("hf-lottalora")
