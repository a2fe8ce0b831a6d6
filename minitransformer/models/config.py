"""The configuration of a model: a frozen, validated dataclass, and named presets."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from minitransformer.architecture.attention import QK_NORMS
from minitransformer.architecture.block import Block
from minitransformer.architecture.embeddings import POOLING_ACTIVATIONS
from minitransformer.architecture.feedforward import FeedForward
from minitransformer.architecture.init import Initialisation
from minitransformer.architecture.kernels import KERNELS
from minitransformer.architecture.norms import Norm
from minitransformer.architecture.positions import PositionScheme
from minitransformer.architecture.residual import Residual, Surroundings
from minitransformer.errors import UserError
from minitransformer.models.adapters import Adapter
from minitransformer.models.formats import WeightFormat
from minitransformer.registry import lookup
from minitransformer.settings import Choice, check_settings, setting

# Topologies and the modules that define them; those import this one.
TOPOLOGIES = {
    "decoder": "decoder",
    "decoder-classifier": "decoder",
    "encoder": "encoder",
    "encoder-classifier": "encoder",
    "encoder-headless": "encoder",
    "encoder-decoder": "encoder_decoder",
    "rnn": "recurrent",
}
IMPORTED_ONLY = {"encoder-headless"}
"""topologies that can only be imported: no objective trains them"""
TRAINED = [name for name in TOPOLOGIES if name not in IMPORTED_ONLY]
# Larger values are mistakes, and would exhaust memory before any other check.
MOST_MODULES, MOST_FEATURES = 10_000, 1 << 27
HEADS = ("linear", "transformed")


PAIRS = ("topology", ("encoder-decoder", "rnn"))
ENCODERS = ("topology", ("encoder", "encoder-classifier", "encoder-headless"))
CLASSIFIERS = ("topology", ("encoder-classifier", "decoder-classifier"))
WITH_ATTENTION = ("topology", tuple(name for name in TOPOLOGIES if name != "rnn"))
WITH_HEAD = ("topology", tuple(name for name in TOPOLOGIES if name not in (*CLASSIFIERS[1], "encoder-headless")))
"""topologies in which a setting has an effect"""


def size_setting(default: int | None, *, help: str, **about: Any) -> Any:
    """A setting that counts features or tokens."""
    return setting(default, at_least=1, most=MOST_FEATURES, help=help, **about)


def count_setting(default: int | None, *, help: str, **about: Any) -> Any:
    """A setting that counts modules."""
    return setting(default, at_least=1, most=MOST_MODULES, help=help, **about)


@dataclass(frozen=True)
class ModelConfig:
    """The architecture: its dimensions and the variant of each component.

    Raises `UserError` for an invalid value.
    """

    topology: str = setting("decoder", help=f"kind of model: {', '.join(TRAINED)}")
    d_model: int = size_setting(256, help="width of the residual stream")
    num_layers: int = count_setting(4, help="number of blocks; in an encoder-decoder, of encoder blocks")
    num_decoder_layers: int | None = count_setting(
        None, needs=PAIRS, help="number of decoder blocks of an encoder-decoder; None is num_layers"
    )
    num_heads: int = size_setting(4, needs=WITH_ATTENTION, help="number of attention heads")
    num_kv_heads: int | None = size_setting(
        None, needs=WITH_ATTENTION, help="number of key and value heads (grouped-query attention); None is num_heads"
    )
    head_dim: int | None = size_setting(
        None, needs=WITH_ATTENTION, help="dimension of each head; None is d_model / num_heads"
    )
    d_ff: int | None = size_setting(
        None,
        needs=WITH_ATTENTION,
        help="hidden dimension of the feed-forward network; None is 4 d_model, or 8/3 d_model if gated",
    )
    context_length: int = size_setting(256, help="maximum number of tokens that the model attends to")
    vocab_size: int | None = size_setting(
        None,
        changes_tokens=True,
        follows_data=True,
        help="vocabulary size, into which the tokenizer must fit; None is the tokenizer's",
    )
    target_vocab_size: int | None = size_setting(
        None,
        changes_tokens=True,
        follows_data=True,
        needs=PAIRS,
        help="size of a separate target vocabulary in an encoder-decoder; None is one shared vocabulary",
    )
    num_segments: int | None = size_setting(
        None,
        needs=ENCODERS,
        help="number of segment embeddings, such as 2 for BERT's sentence pairs; None is no segment embedding",
    )
    next_sentence: bool = setting(False, needs=ENCODERS, help="add a next-sentence prediction head to an encoder")
    num_classes: int | None = size_setting(
        None,
        needs=CLASSIFIERS,
        changes_task=True,
        follows_data=True,
        help="number of classes of a classifier; None is that of the data",
    )
    pooled: str = setting(
        "first",
        choices=("first", "mean"),
        needs=("topology", ("encoder-classifier",)),
        help="what the class head of an encoder reads: the first token, or the mean of all tokens",
    )
    pooling: str = setting(
        "tanh", choices=POOLING_ACTIVATIONS, needs=CLASSIFIERS, help="activation of the classifier's pooling layer"
    )
    pooled_norm: bool = setting(False, needs=CLASSIFIERS, help="normalise the output of the classifier's pooling layer")
    block: Choice[Block] = Choice(Block, "sequential", needs=WITH_ATTENTION, help="arrangement of the sublayers")
    residual: Choice[Residual] = Choice(Residual, "pre", needs=WITH_ATTENTION, help="norm placement")
    first_norm: bool = setting(
        True,
        needs=("residual", ("pre",)),
        help="normalise the input of the first sublayer, which embedding_norm has normalised already",
    )
    norm: Choice[Norm] = Choice(Norm, "layer", needs=WITH_ATTENTION, help="normalisation layer")
    embedding_norm: bool = setting(False, needs=WITH_ATTENTION, help="normalise the embeddings before the first block")
    token_smear: bool = setting(
        False,
        needs=WITH_ATTENTION,
        help="add the previous token's embedding to each embedding, with a learned gain per feature",
    )
    positions: Choice[PositionScheme] = Choice(PositionScheme, "rotary", needs=WITH_ATTENTION, help="position scheme")
    feedforward: Choice[FeedForward] = Choice(
        FeedForward, "gelu-tanh", needs=WITH_ATTENTION, help="feed-forward network"
    )
    num_experts: int | None = count_setting(
        None,
        needs=WITH_ATTENTION,
        help="number of experts in a mixture of experts; None is one dense feed-forward network",
    )
    experts_per_token: int = size_setting(2, needs="num_experts", help="number of experts that process each token")
    bias: bool = setting(False, needs=WITH_ATTENTION, help="use biases in linear layers and in LayerNorm")
    qkv_bias: bool | None = setting(
        None, needs=WITH_ATTENTION, help="use biases in query, key and value projections; None is as --bias"
    )
    attention_output_bias: bool | None = setting(
        None, needs=WITH_ATTENTION, help="bias of attention's output projection; None is bias"
    )
    qk_norm: str = setting("none", choices=QK_NORMS, needs=WITH_ATTENTION, help="normalise queries and keys")
    value_norm: bool = setting(False, needs=WITH_ATTENTION, help="normalise values in the same way as qk_norm")
    qkv_clip: float | None = setting(
        None,
        above=0,
        needs=WITH_ATTENTION,
        help="largest absolute value of projected queries, keys and values; None is no limit",
    )
    attention_scale: float | None = setting(
        None, above=0, needs=WITH_ATTENTION, help="factor of the attention scores; None is head_dim^-1/2"
    )
    attention_softcap: float | None = setting(
        None, above=0, needs=WITH_ATTENTION, help="soft cap c of the scores s: c · tanh(s / c); None is no cap"
    )
    attention_window: int | None = size_setting(
        None,
        needs=WITH_ATTENTION,
        help="size of the sliding window of attention, own token included; None is full attention",
    )
    window_pattern: tuple[bool, ...] = setting(
        (True,), needs="attention_window", help="which layers use the window; the pattern repeats over all layers"
    )
    attention_kernel: str = setting("auto", choices=KERNELS, needs=WITH_ATTENTION, help="implementation of attention")
    head: str = setting("linear", choices=HEADS, needs=WITH_HEAD, help="language-model head")
    transform_bias: bool = setting(
        True,
        needs=("topology", (*WITH_HEAD[1], *CLASSIFIERS[1])),
        help="use a bias in the first linear layer of the head 'transformed', or of a classifier",
    )
    head_bias: bool = setting(False, needs=WITH_HEAD, help="use a bias in the language-model head")
    logit_scale: float = setting(1.0, needs=WITH_HEAD, help="factor of the head's input")
    logit_softcap: float | None = setting(
        None, needs=WITH_HEAD, help="soft cap c of the logits z: c · tanh(z / c); None is no cap"
    )
    tied_embeddings: bool = setting(True, needs=WITH_HEAD, help="tie the head's weights to the token embedding")
    shared_embeddings: bool = setting(
        True, needs=PAIRS, help="share the token embedding of encoder and decoder, if they have one vocabulary"
    )
    embedding_scale: float = setting(1.0, above=0, help="factor of token embeddings")
    scaled_embeddings: bool = setting(False, help="also scale token embeddings by the square root of d_model")
    embedding_dim: int | None = size_setting(
        None, help="width of the token embedding, projected to d_model; None is d_model, without a projection"
    )
    dropout: float = setting(
        0.0, at_least=0, below=1, help="dropout probability of embeddings, attention weights and sublayer outputs"
    )
    init: Choice[Initialisation] = Choice(Initialisation, "gpt2", help="weight initialisation")
    weight_format: Choice[WeightFormat] = Choice(
        WeightFormat,
        "fp32",
        needs=WITH_ATTENTION,
        help="format of matrices; others than fp32 are not trained, and come from `minitransformer compress`",
    )
    adapter: Choice[Adapter] = Choice(
        Adapter, "none", needs=WITH_ATTENTION, help="what a fine-tune trains in place of all weights"
    )

    def __post_init__(self) -> None:
        check_settings(self)
        lookup("topology", self.topology, TOPOLOGIES)
        self._check_heads()
        self._check_parts()
        self.weight_format.make()
        if self.text_length < 1:
            taken = self.context_length - self.text_length
            raise UserError(
                f"a prompt of {taken} virtual tokens leaves no room for a text in a context of {self.context_length}: "
                f"give fewer than {self.context_length}"
            )
        layers = [self.num_layers, self.decoder_layers] if self.topology == "encoder-decoder" else [self.num_layers]
        around = Surroundings(min(layers), self.block.variant.is_parallel, self.norm.variant)
        self.residual.variant.check(self.residual.settings, around)

    def _check_heads(self) -> None:
        if self.head_dim is None and self.d_model % self.num_heads:
            nearest = self.num_heads * max(1, round(self.d_model / self.num_heads))
            raise UserError(
                f"d_model {self.d_model} is not divisible by num_heads {self.num_heads}: "
                f"choose a multiple, such as {nearest}, or give head_dim"
            )
        if self.num_heads % (self.num_kv_heads or self.num_heads):
            raise UserError(
                f"num_heads {self.num_heads} is not divisible by num_kv_heads {self.num_kv_heads}: choose a divisor"
            )
        if self.value_norm and self.qk_norm == "none" and not self.residual.variant.has_qkv_norm:
            raise UserError("value_norm needs qk_norm, which is 'none': choose qk_norm 'head' or 'full'")
        if not self.window_pattern:
            raise UserError("window_pattern is empty: give True or False for at least one layer")

    def _check_parts(self) -> None:
        if self.num_experts is not None and self.experts_per_token > self.num_experts:
            raise UserError(
                f"experts_per_token {self.experts_per_token} is greater than num_experts {self.num_experts}: lower it"
            )
        if self.block.name == "parallel-two-norms" and self.residual.name != "pre":
            raise UserError(
                f"block 'parallel-two-norms' needs residual 'pre', not {self.residual.name!r}: choose 'pre'"
            )
        if self.num_classes is not None and self.topology not in CLASSIFIERS[1]:
            raise UserError(
                f"topology {self.topology!r} has no classes, and num_classes is {self.num_classes}: leave it out"
            )
        if self.next_sentence and (self.num_segments or 0) < 2:
            raise UserError(f"next_sentence needs two segments, and num_segments is {self.num_segments}: set it to 2")
        if self.head == "transformed" and self.embedding_dim is not None:
            raise UserError(
                f"head 'transformed' cannot be combined with embedding_dim {self.embedding_dim}: leave one of them out"
            )
        if not self.first_norm and self.residual.name != "pre":
            raise UserError(
                f"first_norm has no effect with residual {self.residual.name!r}: leave it out, or choose 'pre'"
            )
        if not self.transform_bias and self.topology in WITH_HEAD[1] and self.head != "transformed":
            raise UserError("transform_bias has no effect with head 'linear': leave it out, or choose 'transformed'")
        if self.positions.variant.table_per_position and self.context_length * self.d_model > MOST_FEATURES:
            raise UserError(
                f"positions {self.positions.name!r} need a table of context_length {self.context_length} times d_model "
                f"{self.d_model}, which does not fit into memory: lower one, or choose positions without a table"
            )

    @property
    def features_per_head(self) -> int:
        return self.head_dim or self.d_model // self.num_heads

    @property
    def decoder_layers(self) -> int:
        return self.num_decoder_layers or self.num_layers

    @property
    def base(self) -> ModelConfig:
        """The same model without an adapter."""
        return replace(self, adapter="none")

    @property
    def plain(self) -> ModelConfig:
        """The same model without an adapter, with all weights in full."""
        return replace(self, adapter="none", weight_format="fp32")

    @property
    def text_length(self) -> int:
        """Maximum number of tokens of a text that the model attends to."""
        return self.context_length - self.adapter.make().prefix_length

    def window_of(self, layer: int) -> int | None:
        """The attention window of a layer; None for full attention."""
        return self.attention_window if self.window_pattern[layer % len(self.window_pattern)] else None


MODERN = ModelConfig(feedforward="squared-relu", qk_norm="head", tied_embeddings=False, init="zero-output")

PRESETS: dict[str, ModelConfig] = {
    "gpt-nano": replace(MODERN, d_model=64, num_layers=3, num_heads=4, context_length=256),
    "gpt-micro": replace(MODERN, d_model=128, num_layers=4, num_heads=4, context_length=256),
    "gpt-mini": replace(MODERN, d_model=256, num_layers=4, num_heads=4, context_length=256),
    "gpt-small": replace(MODERN, d_model=384, num_layers=6, num_heads=6, context_length=256),
    "gpt-medium": replace(MODERN, d_model=512, num_layers=8, num_heads=8, context_length=512),
    "gpt2-124m": ModelConfig(
        d_model=768,
        num_layers=12,
        num_heads=12,
        context_length=1024,
        vocab_size=50257,
        positions="learned",
        bias=True,
        dropout=0.1,
    ),
    "bert-mini": replace(
        MODERN,
        topology="encoder",
        d_model=128,
        num_layers=4,
        num_heads=4,
        context_length=128,
        feedforward="geglu",
        qk_norm="none",
        embedding_norm=True,
        first_norm=False,
        head="transformed",
    ),
    "t5-mini": ModelConfig(
        topology="encoder-decoder",
        d_model=128,
        num_layers=4,
        num_decoder_layers=2,
        num_heads=4,
        context_length=128,
        norm="rms",
        positions="t5",
        feedforward="geglu-tanh",
    ),
    "transformer-mini": ModelConfig(
        topology="encoder-decoder",
        d_model=128,
        num_layers=2,
        num_heads=4,
        context_length=128,
        norm="rms",
        init="xavier",
    ),
    "rnn-attention": ModelConfig(
        topology="rnn", d_model=128, num_layers=1, context_length=128, init="xavier", positions="none"
    ),
    # The text-only Transformer-Tiny of work on translating image captions: Wu et al. 2021 (arXiv 2105.14462).
    "multi30k-tiny": ModelConfig(
        topology="encoder-decoder",
        d_model=128,
        num_layers=4,
        num_heads=4,
        d_ff=256,
        context_length=128,
        vocab_size=10_000,
        positions="sinusoidal-halves",
        feedforward="relu",
        bias=True,
        scaled_embeddings=True,
        dropout=0.2,
        init="xavier",
    ),
    "shakespeare-fast": replace(
        MODERN, d_model=128, num_layers=1, num_heads=4, num_kv_heads=2, context_length=96, token_smear=True
    ),
    "shakespeare": replace(
        MODERN, d_model=160, num_layers=4, num_heads=5, context_length=256, token_smear=True, dropout=0.1
    ),
    # The shape that nanoGPT's README trains on a CPU: characters, no biases, no dropout, exact GELU.
    "nanogpt-cpu": ModelConfig(
        d_model=128, num_layers=4, num_heads=4, context_length=64, positions="learned", feedforward="gelu"
    ),
}
