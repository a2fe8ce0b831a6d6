"""What a model is made of: one frozen, validated record, and presets by name."""

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
from minitransformer.registry import lookup
from minitransformer.settings import Choice, check_settings, setting

# Each topology and the module that has it, which imports this one.
TOPOLOGIES = {
    "decoder": "decoder",
    "encoder": "encoder",
    "encoder-classifier": "encoder",
    "encoder-decoder": "encoder_decoder",
    "rnn": "recurrent",
}
IMPORTED_ONLY = {"encoder-classifier"}
"""topologies of public checkpoints that no objective trains"""
TRAINED = [name for name in TOPOLOGIES if name not in IMPORTED_ONLY]
# More than any model has: what is larger is a mistake, and would fill the memory before anything else could say so.
MOST_MODULES, MOST_FEATURES = 10_000, 1 << 27
HEADS = {"linear": "LMHead", "transformed": "TransformedHead"}


PAIRS = ("topology", ("encoder-decoder", "rnn"))
ENCODERS = ("topology", ("encoder", "encoder-classifier"))
CLASSIFIERS = ("topology", ("encoder-classifier",))
WITH_ATTENTION = ("topology", tuple(name for name in TOPOLOGIES if name != "rnn"))
"""what settings need that have no effect on other topologies"""


def size_setting(default: int | None, *, help: str, **about: Any) -> Any:
    """A setting that counts features or tokens."""
    return setting(default, at_least=1, most=MOST_FEATURES, help=help, **about)


def count_setting(default: int | None, *, help: str, **about: Any) -> Any:
    """A setting that counts modules."""
    return setting(default, at_least=1, most=MOST_MODULES, help=help, **about)


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a model and the choice of its parts. Raises `UserError` for a value that no model can have."""

    topology: str = setting("decoder", help=f"what the model is: {', '.join(TRAINED)}")
    d_model: int = size_setting(256, help="features of the residual stream")
    num_layers: int = count_setting(4, help="transformer blocks, in an encoder-decoder those of the encoder")
    num_decoder_layers: int | None = count_setting(
        None, needs=PAIRS, help="blocks of the decoder of an encoder-decoder; None is num_layers"
    )
    num_heads: int = size_setting(4, needs=WITH_ATTENTION, help="attention heads")
    num_kv_heads: int | None = size_setting(
        None,
        needs=WITH_ATTENTION,
        help="heads of keys and values, shared by the query heads where there are fewer; None is num_heads",
    )
    head_dim: int | None = size_setting(
        None, needs=WITH_ATTENTION, help="features of a head; None is d_model / num_heads"
    )
    d_ff: int | None = size_setting(
        None,
        needs=WITH_ATTENTION,
        help="hidden features of the feed-forward network; None is 4 d_model, or 8/3 d_model if gated",
    )
    context_length: int = size_setting(256, help="tokens that the model can see at once")
    vocab_size: int | None = size_setting(
        None,
        changes_tokens=True,
        follows_data=True,
        help="tokens of the vocabulary: what BPE is trained to, at least what others have; None is 4096 or theirs",
    )
    target_vocab_size: int | None = size_setting(
        None,
        changes_tokens=True,
        follows_data=True,
        needs=PAIRS,
        help="tokens of the decoder's own vocabulary in an encoder-decoder; None is one vocabulary for both sides",
    )
    num_segments: int | None = size_setting(
        None,
        needs=ENCODERS,
        help="kinds of segments that have an embedding, such as BERT's two sentences; None is no such embedding",
    )
    next_sentence: bool = setting(
        False, needs=ENCODERS, help="an encoder also says whether its second segment follows the first"
    )
    num_classes: int | None = size_setting(
        None, needs=CLASSIFIERS, help="classes of an encoder-classifier, which is imported: nothing here trains one"
    )
    pooling: str = setting("tanh", choices=POOLING_ACTIVATIONS, needs=CLASSIFIERS, help="activation before the classes")
    block: Choice[Block] = Choice(Block, "sequential", needs=WITH_ATTENTION, help="arrangement of the sublayers")
    residual: Choice[Residual] = Choice(Residual, "pre", needs=WITH_ATTENTION, help="where the norm stands")
    norm: Choice[Norm] = Choice(Norm, "layer", needs=WITH_ATTENTION, help="norm")
    embedding_norm: bool = setting(False, needs=WITH_ATTENTION, help="normalise the embeddings before the first block")
    token_smear: bool = setting(
        False,
        needs=WITH_ATTENTION,
        help="add to each token's embedding that of the token before it, by a learned gain for each feature",
    )
    positions: Choice[PositionScheme] = Choice(PositionScheme, "rotary", needs=WITH_ATTENTION, help="position scheme")
    feedforward: Choice[FeedForward] = Choice(
        FeedForward, "gelu-tanh", needs=WITH_ATTENTION, help="feed-forward network"
    )
    num_experts: int | None = count_setting(
        None,
        needs=WITH_ATTENTION,
        help="feed-forward networks in a mixture of experts; None is a single one, without a router",
    )
    experts_per_token: int = size_setting(2, needs="num_experts", help="experts that see each token")
    bias: bool = setting(False, needs=WITH_ATTENTION, help="biases in linear maps and in LayerNorm")
    qkv_bias: bool | None = setting(None, needs=WITH_ATTENTION, help="biases of queries, keys and values; None is bias")
    attention_output_bias: bool | None = setting(
        None, needs=WITH_ATTENTION, help="biases of attention's output; None is bias"
    )
    qk_norm: str = setting("none", choices=QK_NORMS, needs=WITH_ATTENTION, help="normalise queries and keys")
    value_norm: bool = setting(False, needs=WITH_ATTENTION, help="normalise values as qk_norm does queries and keys")
    attention_scale: float | None = setting(
        None, above=0, needs=WITH_ATTENTION, help="what scores are multiplied by; None is head_dim^-1/2"
    )
    attention_softcap: float | None = setting(
        None, above=0, needs=WITH_ATTENTION, help="bound of the scores, by a tanh; None is no bound"
    )
    attention_window: int | None = size_setting(
        None, needs=WITH_ATTENTION, help="a token sees this many tokens at most, itself included; None is all of them"
    )
    window_pattern: tuple[bool, ...] = setting(
        (True,), needs="attention_window", help="which layers have the window, repeated over all layers"
    )
    attention_kernel: str = setting("auto", choices=KERNELS, needs=WITH_ATTENTION, help="how attention is computed")
    head: str = setting("linear", choices=HEADS, help="what predicts tokens")
    head_bias: bool = setting(False, help="biases of the logits")
    logit_scale: float = setting(1.0, help="what the head's input is multiplied by")
    logit_softcap: float | None = setting(None, help="bound of the logits, by a tanh; None is no bound")
    tied_embeddings: bool = setting(True, help="the head uses the weights of the token embedding")
    shared_embeddings: bool = setting(
        True, needs=PAIRS, help="encoder and decoder use the same token embedding, if they have one vocabulary"
    )
    scaled_embeddings: bool = setting(False, help="multiply token embeddings by the square root of d_model")
    embedding_dim: int | None = size_setting(
        None,
        help="features of the token embedding, which a linear map brings to d_model; None is d_model, without the map",
    )
    dropout: float = setting(
        0.0, at_least=0, below=1, help="share of embeddings, attention weights and sublayer outputs that training drops"
    )
    init: Choice[Initialisation] = Choice(Initialisation, "gpt2", help="how weights start")

    def __post_init__(self) -> None:
        check_settings(self)
        lookup("topology", self.topology, TOPOLOGIES)
        self._check_heads()
        self._check_parts()
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
            raise UserError("value_norm is as qk_norm, and qk_norm is 'none': choose qk_norm 'head' or 'full'")
        if not self.window_pattern:
            raise UserError("window_pattern is empty: say for at least one layer whether it has the window")

    def _check_parts(self) -> None:
        if self.num_experts is not None and self.experts_per_token > self.num_experts:
            raise UserError(
                f"experts_per_token {self.experts_per_token} is more than num_experts {self.num_experts}: lower it"
            )
        if self.block.name == "parallel-two-norms" and self.residual.name != "pre":
            raise UserError(
                f"block 'parallel-two-norms' is Pre-LN, and residual is {self.residual.name!r}: choose 'pre'"
            )
        if (self.topology == "encoder-classifier") != (self.num_classes is not None):
            raise UserError(
                f"topology is {self.topology!r} and num_classes {self.num_classes}: "
                "an encoder-classifier, and no other, has classes, and it is imported, as nothing here trains one"
            )
        if self.next_sentence and (self.num_segments or 0) < 2:
            raise UserError(
                f"next_sentence tells two segments apart, and num_segments is {self.num_segments}: make it 2"
            )
        if self.head == "transformed" and self.embedding_dim is not None:
            raise UserError(
                f"head is 'transformed' and embedding_dim {self.embedding_dim}: only one may precede the logits"
            )
        if self.positions.variant.table_per_position and self.context_length * self.d_model > MOST_FEATURES:
            raise UserError(
                f"positions {self.positions.name!r} need a table of context_length {self.context_length} times d_model "
                f"{self.d_model}, which would not fit into memory: lower one, or choose positions without a table"
            )

    @property
    def features_per_head(self) -> int:
        return self.head_dim or self.d_model // self.num_heads

    @property
    def decoder_layers(self) -> int:
        return self.num_decoder_layers or self.num_layers

    def window_of(self, layer: int) -> int | None:
        """The attention window of a layer; None if it sees everything."""
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
        MODERN, topology="encoder", d_model=128, num_layers=4, num_heads=4, context_length=128, head="transformed"
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
        positions="sinusoidal",
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
