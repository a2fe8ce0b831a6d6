"""What a model is made of: one frozen, validated record, and presets by name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any

from typing_extensions import Doc

from minitransformer.architecture.attention import QK_NORMS
from minitransformer.architecture.block import Block
from minitransformer.architecture.embeddings import POOLING_ACTIVATIONS
from minitransformer.architecture.feedforward import FEEDFORWARDS
from minitransformer.architecture.init import Initialisation
from minitransformer.architecture.kernels import KERNELS
from minitransformer.architecture.norms import Norm
from minitransformer.architecture.positions import ROTARY_SCALINGS, PositionScheme
from minitransformer.architecture.residual import Residual, Surroundings
from minitransformer.errors import UserError
from minitransformer.registry import lookup

# Each topology and the module that has it, which imports this one.
TOPOLOGIES = {
    "decoder": "decoder",
    "encoder": "encoder",
    "encoder-classifier": "encoder",
    "encoder-decoder": "encoder_decoder",
    "rnn": "recurrent",
}
LARGEST, SMALLEST = 3.4028234663852886e38, 1.1754943508222875e-38
"""of the positive numbers that float32 has in full precision"""
IMPORTED_ONLY = {"encoder-classifier"}
"""topologies of public checkpoints that no objective trains"""
TRAINED = [name for name in TOPOLOGIES if name not in IMPORTED_ONLY]
# More than any model has: what is larger is a mistake, and would fill the memory before anything else could say so.
MOST_MODULES, MOST_FEATURES = 10_000, 1 << 27
HEADS = {"linear": "LMHead", "transformed": "TransformedHead"}


def choice(what: str, names: Iterable[str]) -> Doc:
    """The description of a field that holds one of `names`."""
    return Doc(f"{what}: {', '.join(names)}")


def check_numbers(config: Any) -> None:
    """Raises `UserError` if a field of the dataclass `config` is a number that is not finite in float32.

    NaN among them: comparisons let it pass, and from one setting it spreads to all weights.
    """
    for name, value in vars(config).items():
        if isinstance(value, float) and not abs(value) <= LARGEST:
            raise UserError(f"{name} is {value}: it must be finite, in float32 too")


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a model and the choice of its parts. Raises `UserError` for a value that no model can have."""

    topology: Annotated[str, choice("what the model is", TRAINED)] = "decoder"
    d_model: int = 256
    """features of the residual stream"""
    num_layers: int = 4
    """transformer blocks, in an encoder-decoder those of the encoder"""
    num_decoder_layers: int | None = None
    """blocks of the decoder of an encoder-decoder; None is num_layers"""
    num_heads: int = 4
    """attention heads"""
    num_kv_heads: int | None = None
    """heads of keys and values, shared by the query heads where there are fewer; None is num_heads"""
    head_dim: int | None = None
    """features of a head; None is d_model / num_heads"""
    d_ff: int | None = None
    """hidden features of the feed-forward network; None is 4 d_model, or 8/3 d_model if gated"""
    context_length: int = 256
    """tokens that the model can see at once"""
    vocab_size: int | None = None
    """tokens of the vocabulary: what BPE is trained to, at least what others have; None is 4096 or theirs"""
    target_vocab_size: int | None = None
    """tokens of the decoder's own vocabulary in an encoder-decoder; None is one vocabulary for both sides"""
    num_segments: int | None = None
    """kinds of segments that have an embedding, such as BERT's two sentences; None is no such embedding"""
    next_sentence: bool = False
    """an encoder also says whether its second segment follows the first"""
    num_classes: int | None = None
    """classes of an encoder-classifier, which is imported: nothing here trains one"""
    pooling: Annotated[str, choice("activation before the classes", POOLING_ACTIVATIONS)] = "tanh"
    block: Annotated[str, choice("arrangement of the sublayers", Block.registry)] = "sequential"
    residual: Annotated[str, choice("where the norm stands", Residual.registry)] = "pre"
    norm: Annotated[str, choice("norm", Norm.registry)] = "layer"
    norm_eps: float = 1e-5
    """added to the variance inside a norm"""
    norm_bias: bool | None = None
    """biases in LayerNorm; None is bias"""
    embedding_norm: bool = False
    """normalise the embeddings before the first block"""
    token_smear: bool = False
    """add to each token's embedding that of the token before it, by a learned gain for each feature"""
    positions: Annotated[str, choice("position scheme", PositionScheme.registry)] = "rotary"
    rotary_base: float = 10000.0
    """the slowest pair of features turns about once in 2π times this many positions"""
    rotary_fraction: float = 1.0
    """share of each head's features that are turned"""
    rotary_scaling: Annotated[str, choice("change of the rotary frequencies", ROTARY_SCALINGS)] = "none"
    rotary_factor: float = 1.0
    """how much slower rotary_scaling makes the (slow) turns"""
    rotary_low_freq_factor: float = 1.0
    """llama3: turns that fit fewer times than this into rotary_original_length are slow"""
    rotary_high_freq_factor: float = 4.0
    """llama3: turns that fit at least this many times into rotary_original_length stay"""
    rotary_original_length: int = 8192
    """llama3: the context length before the change"""
    t5_buckets: int = 32
    """buckets of distances, each with its bias"""
    t5_max_distance: int = 128
    """distances from here on share a bucket"""
    feedforward: Annotated[str, choice("feed-forward network", FEEDFORWARDS)] = "gelu-tanh"
    num_experts: int | None = None
    """feed-forward networks in a mixture of experts; None is a single one, without a router"""
    experts_per_token: int = 2
    """experts that see each token"""
    bias: bool = False
    """biases in linear maps and in LayerNorm"""
    qkv_bias: bool | None = None
    """biases of queries, keys and values; None is bias"""
    attention_output_bias: bool | None = None
    """biases of attention's output; None is bias"""
    qk_norm: Annotated[str, choice("normalise queries and keys", QK_NORMS)] = "none"
    value_norm: bool = False
    """normalise values as qk_norm does queries and keys"""
    attention_scale: float | None = None
    """what scores are multiplied by; None is head_dim^-1/2"""
    attention_softcap: float | None = None
    """bound of the scores, by a tanh; None is no bound"""
    attention_window: int | None = None
    """a token sees this many tokens at most, itself included; None is all of them"""
    window_pattern: tuple[bool, ...] = (True,)
    """which layers have the window, repeated over all layers"""
    attention_kernel: Annotated[str, choice("how attention is computed", KERNELS)] = "auto"
    head: Annotated[str, choice("what predicts tokens", HEADS)] = "linear"
    head_bias: bool = False
    """biases of the logits"""
    logit_scale: float = 1.0
    """what the head's input is multiplied by"""
    logit_softcap: float | None = None
    """bound of the logits, by a tanh; None is no bound"""
    tied_embeddings: bool = True
    """the head uses the weights of the token embedding"""
    shared_embeddings: bool = True
    """encoder and decoder use the same token embedding, if they have one vocabulary"""
    scaled_embeddings: bool = False
    """multiply token embeddings by the square root of d_model"""
    embedding_dim: int | None = None
    """features of the token embedding, which a linear map brings to d_model; None is d_model, without the map"""
    dropout: float = 0.0
    """share of embeddings, attention weights and sublayer outputs that training drops"""
    init: Annotated[str, choice("how weights start", Initialisation.registry)] = "gpt2"

    def __post_init__(self) -> None:
        check_numbers(self)
        self._check_sizes()
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
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout is {self.dropout}: it must be at least 0 and below 1")
        for name in ("norm_eps", "rotary_base", "rotary_factor", "attention_scale", "attention_softcap"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"{name} is {value}: it must be above 0")
        if self.norm_eps < SMALLEST:
            raise UserError(f"norm_eps is {self.norm_eps}, which is 0 in float32: it must be at least {SMALLEST:.1e}")
        if not 0 < self.rotary_fraction <= 1:
            raise UserError(f"rotary_fraction is {self.rotary_fraction}: it must be above 0 and at most 1")
        if self.num_experts is not None and self.experts_per_token > self.num_experts:
            raise UserError(
                f"experts_per_token {self.experts_per_token} is more than num_experts {self.num_experts}: lower it"
            )
        if self.block == "parallel-two-norms" and self.residual != "pre":
            raise UserError(f"block 'parallel-two-norms' is Pre-LN, and residual is {self.residual!r}: choose 'pre'")
        if self.value_norm and self.qk_norm == "none" and not Residual.named(self.residual).has_qkv_norm:
            raise UserError("value_norm is as qk_norm, and qk_norm is 'none': choose qk_norm 'head' or 'full'")
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
        if not self.window_pattern:
            raise UserError("window_pattern is empty: say for at least one layer whether it has the window")
        for family, name in (
            (Block, self.block),
            (Residual, self.residual),
            (Norm, self.norm),
            (PositionScheme, self.positions),
            (Initialisation, self.init),
        ):
            family.named(name)
        lookup("topology", self.topology, TOPOLOGIES)
        lookup("rotary scaling", self.rotary_scaling, ROTARY_SCALINGS)
        lookup("feed-forward network", self.feedforward, FEEDFORWARDS)
        lookup("head", self.head, HEADS)
        lookup("attention kernel", self.attention_kernel, KERNELS)
        lookup("pooling", self.pooling, POOLING_ACTIVATIONS)
        lookup("norm of queries and keys", self.qk_norm, QK_NORMS)
        Residual.named(self.residual).check(self._around_connections)

    @property
    def _around_connections(self) -> Surroundings:
        layers = [self.num_layers, self.decoder_layers] if self.topology == "encoder-decoder" else [self.num_layers]
        return Surroundings(min(layers), Block.named(self.block).is_parallel, Norm.named(self.norm))

    def _check_sizes(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type not in ("int", "int | None") or value is None:
                continue
            if value < 1:
                raise UserError(f"{field.name} is {value}: it must be at least 1")
            most = MOST_MODULES if field.name in ("num_layers", "num_decoder_layers", "num_experts") else MOST_FEATURES
            if value > most:
                raise UserError(f"{field.name} is {value}: it must be at most {most:,}")
        if "sinusoidal" in self.positions and self.context_length * self.d_model > MOST_FEATURES:
            raise UserError(
                f"positions {self.positions!r} need a table of context_length {self.context_length} times d_model "
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
