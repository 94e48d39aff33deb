"""A scan in a folder or at a URL: what a frozen model says of every token worth learning from, in
safetensors.

    scan.json                    settings, fingerprints, and once it is finished the counts
    shard-000012.safetensors     examples 12·examples_per_shard … of the data; a file that is there
                                 is whole

A shard holds, for its n tokens: hidden [n, H] bf16; gap, target_prob, entropy [n] fp32; rank,
target, document, position [n] int32: 2·H + 28 bytes a token. Its header holds counts. `document` is
the example's number in the data. The same scan makes the same bytes.

What a token weighs follows from what is there: a trivial one 1/easy_fraction, all others 1
(`Scan.weight`).
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from autodeco_fast import TokenStats
from autodeco_fast.errors import foreign, read_json_object
from autodeco_fast.files import atomic_write, write_text
from autodeco_fast.losses.selection import TRIVIAL, bucket_of, easy_token_weight
from autodeco_fast.training.remote_tensors import RemoteTensors
from autodeco_fast.training.wishes import VARIANTS
from autodeco_fast.urls import Location, Unreachable, Url, location, of_each
from autodeco_fast.values import SEEDS, finite, require, whole

MANIFEST = "scan.json"
FORMAT = 2  # 1: the targets of chats were others
_SHORT = 16  # of a digest, in hexadecimal digits
_FACTS = "scan"  # the one key of a shard's metadata: safetensors writes several in any order
FIELDS = ("gap", "target_prob", "entropy", "rank", "target", "document", "position")
TENSORS = ("hidden", *FIELDS)
COUNTS = (
    "examples",
    "seen",
    "not_finite",
    "trivial",
    "middle",
    "impossible",
    "selected_trivial",
    "selected_middle",
    "selected_impossible",
)


def token_bytes(hidden_size: int) -> int:
    """Bytes of a token in a shard."""
    return 2 * hidden_size + 28


@dataclass
class ScanTokens:
    """Tokens of a scan; the LM head's answer to each, `[n]`."""

    hidden: torch.Tensor  # [n, H] bf16
    gap: torch.Tensor  # max z − z_y
    target_prob: torch.Tensor
    entropy: torch.Tensor  # nats
    rank: torch.Tensor
    target: torch.Tensor
    document: torch.Tensor
    position: torch.Tensor

    def __len__(self) -> int:
        return len(self.gap)

    def __getitem__(self, index: torch.Tensor | slice) -> "ScanTokens":
        return ScanTokens(*(getattr(self, name)[index] for name in TENSORS))

    def to(self, device: torch.device) -> "ScanTokens":
        return ScanTokens(*(getattr(self, name).to(device) for name in TENSORS))

    def stats(self) -> TokenStats:
        """As of logits whose target is 0: gaps, ranks and probabilities are what losses look at.
        argmax is not known: −1."""
        zero = torch.zeros_like(self.gap)
        log_p = self.target_prob.clamp(min=1e-38).log()
        unknown = torch.full_like(self.rank, -1).long()
        return TokenStats(self.gap, unknown, zero, -log_p, self.rank.long(), self.entropy)

    @staticmethod
    def none(hidden_size: int) -> "ScanTokens":
        empty = torch.zeros(0)
        hidden = torch.zeros(0, hidden_size, dtype=torch.bfloat16)
        return ScanTokens(hidden, *[empty] * 3, *[empty.int()] * 4)

    @staticmethod
    def cat(several: list["ScanTokens"]) -> "ScanTokens":
        return ScanTokens(*(torch.cat([getattr(t, name) for t in several]) for name in TENSORS))

    @staticmethod
    def in_order(several: list["ScanTokens"]) -> "ScanTokens":
        """All tokens by document and position, as in the data; each is copied once."""
        key = torch.cat([(t.document.long() << 32) + t.position for t in several])
        index = torch.empty_like(key)
        index[key.argsort()] = torch.arange(len(key))
        indices = index.split([len(t) for t in several])

        def merged(name: str) -> torch.Tensor:
            first = getattr(several[0], name)
            out = first.new_empty(len(key), *first.shape[1:])
            for tokens, at in zip(several, indices):
                out[at] = getattr(tokens, name)
            return out

        return ScanTokens(*(merged(name) for name in TENSORS))


def fingerprint(*contents: bytes | torch.Tensor) -> str:
    """sha256 of bytes and of tensors' bytes, shortened."""
    digest = hashlib.sha256()
    for content in contents:
        if isinstance(content, torch.Tensor):
            content = content.detach().cpu().contiguous().view(torch.uint8).numpy()
        digest.update(content)
    return digest.hexdigest()[:_SHORT]


def file_fingerprint(path: Path) -> str:
    """`fingerprint` of a file's bytes, of which few are held at once."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while some := file.read(1 << 20):
            digest.update(some)
    return digest.hexdigest()[:_SHORT]


def shard_path(folder: Location, number: int) -> Location:
    return folder / f"shard-{number:06d}.safetensors"


def write_shard(path: Location, tokens: ScanTokens, counts: dict[str, int], share: float) -> None:
    """Writes a whole shard, or none; `share` of the tokens that were selected are in it.

    Raises:
        ValueError: naming the file, if it cannot be written.
    """
    tensors = {name: getattr(tokens, name).cpu().contiguous() for name in TENSORS}
    facts = {**{name: counts[name] for name in COUNTS}, "share": share}
    try:
        atomic_write(
            path, lambda draft: save_file(tensors, draft, metadata={_FACTS: json.dumps(facts)})
        )
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot write {path}: {error}") from None


def _unreadable(path: Location) -> str:
    return f"{path} is not a whole shard of a scan, delete it and scan again"


@contextmanager
def _opened(path: Location) -> Iterator[safe_open | RemoteTensors]:
    """A shard; what is wrong with it is a complaint about it, and what its storage refuses is
    none."""
    try:
        open_ = RemoteTensors if isinstance(path, Url) else partial(safe_open, framework="pt")
        with foreign(_unreadable(path)), open_(path) as file:
            yield file
    except ValueError as error:
        if isinstance(error.__cause__, Unreachable):
            raise error.__cause__ from None
        raise


def read_facts(path: Location, hidden_size: int) -> tuple[dict[str, int], float, int]:
    """A shard's counts, share and number of tokens, from its header.

    Raises:
        ValueError: naming the file, if it is no such shard.
    """
    with _opened(path) as file:
        metadata = file.metadata() or {}
        shapes = {name: file.get_slice(name).get_shape() for name in TENSORS}
        dtypes = [file.get_slice(name).get_dtype() for name in TENSORS]
        facts = json.loads(metadata[_FACTS])
        counts, share = {name: int(facts[name]) for name in COUNTS}, float(facts["share"])
    n = shapes["gap"][0] if len(shapes["gap"]) == 1 else -1
    want = {"hidden": [n, hidden_size], **{name: [n] for name in FIELDS}}
    if shapes != want or dtypes != ["BF16", *["F32"] * 3, *["I32"] * 4] or not 0 < share <= 1:
        raise ValueError(f"{_unreadable(path)}: its tensors are not those of width {hidden_size}")
    return counts, share, n


def all_facts(
    folder: Location, shards: int, hidden_size: int
) -> Iterator[tuple[dict[str, int], float, int]]:
    """Those of the first `shards` shards; raises as `read_facts`."""
    paths = (shard_path(folder, number) for number in range(shards))
    return of_each(partial(read_facts, hidden_size=hidden_size), paths)


def read_shard(path: Location, index: slice = slice(None)) -> ScanTokens:
    """A shard's tokens, or some of them, of which alone memory is taken.

    Raises:
        ValueError: naming the file, if it is no such shard, or a gap, probability or rank is none.
    """
    tokens = ScanTokens(*read_fields(path, TENSORS, index))
    likely = (tokens.target_prob >= 0) & (tokens.target_prob < 1.01)  # a sure token's is rounded
    good = (tokens.gap >= 0) & likely  # NaN is not
    for name in ("rank", "target", "document", "position"):
        good &= getattr(tokens, name) >= 0
    if not good.all() or not tokens.hidden.isfinite().all():
        raise ValueError(f"{_unreadable(path)}: it holds NaN, or numbers out of range")
    return tokens


def _rows_of(path: Location, index: torch.Tensor) -> ScanTokens:
    return read_shard(path)[index]


def read_fields(
    path: Location, names: tuple[str, ...], index: slice = slice(None)
) -> list[torch.Tensor]:
    """Some fields of a shard's tokens; raises as `read_shard`."""
    with _opened(path) as file:
        return [file.get_slice(name)[index] for name in names]


def write_manifest(folder: Location, manifest: dict) -> None:
    write_text(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")


def read_manifest(folder: Location) -> dict:
    """`scan.json`.

    Raises:
        ValueError: if the folder holds no scan or cannot be reached, or its manifest is no scan's.
    """
    if isinstance(folder, Url):
        folder.check("scan")
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"scan must be a folder with {MANIFEST}, got {str(folder)!r}")
    manifest = read_json_object(path)
    try:
        _check_manifest(manifest)
    except ValueError as error:
        raise ValueError(f"{path} is not of a scan: {error}") from None
    return manifest


def _is_text(holder: dict, name: str) -> None:
    require(isinstance(holder.get(name), str), name, holder.get(name), "text")


def _check_manifest(manifest: dict) -> None:
    came = manifest.get("format")
    require(came == FORMAT, "format", came, f"{FORMAT}, as this version writes it")
    whole("hidden_size", manifest.get("hidden_size"), 1, 2**24)
    for name in ("lm_head", "tokenizer", "data"):
        _is_text(manifest, name)
    settings = manifest.get("settings")
    require(isinstance(settings, dict), "settings", settings, "an object")
    _is_text(settings, "model")
    require(
        isinstance(settings.get("all_tokens"), bool),
        "all_tokens",
        settings.get("all_tokens"),
        "true or false",
    )
    for name in ("easy_fraction", "trivial_prob"):
        value = finite(name, settings.get(name))
        require(0 <= value <= 1, name, value, "in [0, 1]")
    whole("seed", settings.get("seed"), *SEEDS)
    if "counts" not in manifest:
        return
    counts = manifest["counts"]
    require(isinstance(counts, dict), "counts", counts, "an object")
    for name in COUNTS:
        whole(name, counts.get(name), 0, 2**63 - 1)
    for name in ("shards", "tokens"):
        whole(name, manifest.get(name), 0, 2**63 - 1)
    require(
        0 < finite("share", manifest.get("share")) <= 1, "share", manifest.get("share"), "in (0, 1]"
    )


def discard(folder: Location, shards: int) -> None:
    """Removes a scan's files; the manifest, without which shards mean nothing, goes last."""
    for path in (*(shard_path(folder, number) for number in range(shards)), folder / MANIFEST):
        path.unlink(missing_ok=True)


class Scan:
    """A finished scan in a folder or at a URL, opened: its manifest, its shards and how many tokens
    each holds.

    Raises:
        ValueError: if it is not finished, a shard is missing or broken, or no token is in it.
    """

    def __init__(self, folder: str | Location):
        self.folder = folder = location(folder)
        self.manifest = read_manifest(folder)
        if "counts" not in self.manifest:
            raise ValueError(
                f"scan {str(folder)!r} is not finished: run the same `autodeco-fast scan` again to "
                "continue it"
            )
        self.hidden_size = self.manifest["hidden_size"]
        shards = self.manifest["shards"]
        self.sizes = [tokens for *_, tokens in all_facts(folder, shards, self.hidden_size)]
        self.paths = [shard_path(folder, number) for number in range(shards)]
        if not sum(self.sizes):
            raise ValueError(f"scan {str(folder)!r} holds no token: {why_empty(self.manifest)}")

    def __len__(self) -> int:
        return sum(self.sizes)

    def weight(self, tokens: ScanTokens) -> torch.Tensor:
        """How many tokens of the text each of these tokens of the scan stands for, fp32 `[n]`: one
        over its chance to be selected. `share`, which thins all alike, is left out."""
        settings = self.manifest["settings"]
        ones = torch.ones_like(tokens.gap)
        if settings["all_tokens"]:
            return ones
        bucket = bucket_of(
            tokens.rank,
            tokens.target_prob,
            max_rank=2**31 - 1,  # what was impossible is not here
            trivial_prob=settings["trivial_prob"],
        )
        weight = easy_token_weight(settings["easy_fraction"], "inverse")
        return ones.masked_fill(bucket == TRIVIAL, weight)

    @property
    def variants(self) -> int:
        """Documents in a row that are the same example, with other wishes."""
        return VARIANTS if self.manifest["settings"].get("wishes") else 1

    def example(self, document: torch.Tensor) -> torch.Tensor:
        """Of documents' numbers those of their examples, whatever was wished for before them."""
        return document // self.variants

    def wish(self, tokens: ScanTokens) -> torch.Tensor:
        """What was wished for before each token: NONE, FOR_LESS or FOR_MORE. int32 `[n]`"""
        return tokens.document % self.variants

    def load(self) -> ScanTokens:
        """All tokens at once."""
        return ScanTokens.cat(list(of_each(read_shard, self.paths)))

    def documents(self) -> torch.Tensor:
        """The document of every token. int32 `[n]`"""
        read = partial(read_fields, names=("document",))
        return torch.cat([document for (document,) in of_each(read, self.paths)])

    def rows(self, index: torch.Tensor) -> ScanTokens:
        """The tokens of these numbers, int64 in ascending order, of a shard at a time."""
        ends = torch.tensor([0, *self.sizes]).cumsum(0)
        within = torch.searchsorted(index, ends).diff().tolist()
        local = [some - start for some, start in zip(index.split(within), ends.tolist())]
        wanted = [(path, some) for path, some in zip(self.paths, local) if len(some)]
        if not wanted:
            return ScanTokens.none(self.hidden_size)
        return ScanTokens.cat(list(of_each(_rows_of, *zip(*wanted))))


def why_empty(manifest: dict) -> str:
    """Which setting left nothing."""
    counts = manifest["counts"]
    if not counts["seen"]:
        return "the data has no target"
    if counts["not_finite"] == counts["seen"]:
        return "every hidden state is NaN or infinite"
    if counts["middle"] or manifest["settings"]["all_tokens"]:
        return f"max_bytes leaves less than one of {counts['seen']:,} targets"
    if not counts["trivial"]:
        return f"max_rank dropped all {counts['seen']:,} targets"
    return f"easy_fraction dropped all {counts['trivial']:,} targets that max_rank had left"
