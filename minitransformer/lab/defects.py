"""Models with one injected defect in their residual placement, for the audit of the laboratory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from inspect import getdoc

from minitransformer.architecture.residual import Residual
from minitransformer.lab import mistakes
from minitransformer.lab.subjects import make_model
from minitransformer.models.config import ModelConfig
from minitransformer.models.model import Model


@dataclass(frozen=True)
class Defect:
    """A class with a defect, described in its docstring, that replaces its parent (None: no defect)."""

    placement: type[Residual] | None
    needs_memory: bool = False
    """whether the defect needs an encoder-decoder"""

    @property
    def title(self) -> str:
        if self.placement is None:
            return "no defect"
        mistake = getdoc(self.placement) or self.placement.__name__
        return f"{self.placement.name}: {mistake.removesuffix('.')}"

    def make(self, config: ModelConfig, seed: int) -> Model:
        """`make_model` with the defect in its placement."""
        if self.placement is not None and config.residual.name == self.placement.name:
            config = replace(config, residual=replace(config.residual, variant=self.placement))
        return make_model(config, seed)


DEFECTS = {
    "none": Defect(None),
    "inverted-beta": Defect(mistakes.InvertedBeta),
    "fixed-alpha": Defect(mistakes.FixedAlpha),
    "torchscale-beta": Defect(mistakes.TorchscaleBeta, needs_memory=True),
    "scores-scaled-too": Defect(mistakes.ScoresScaledToo),
    "alpha-of-the-other-stack": Defect(mistakes.AlphaOfTheOtherStack, needs_memory=True),
    "no-final-norm": Defect(mistakes.NoFinalNorm),
    "two-final-norms": Defect(mistakes.TwoFinalNorms),
    "idle-layers": Defect(mistakes.IdleLayers),
    "cross-attention-unnormalised": Defect(mistakes.CrossAttentionUnnormalised, needs_memory=True),
    "final-norm-after-post": Defect(mistakes.FinalNormAfterPost),
    "sandwich-swapped": Defect(mistakes.SandwichSwapped),
    "peri-without-embedding-norm": Defect(mistakes.PeriWithoutEmbeddingNorm),
    "olmo2-norm-of-the-sum": Defect(mistakes.OLMo2NormOfTheSum),
    "final-norm-after-none": Defect(mistakes.FinalNormAfterNone),
    "admin-scales-branch": Defect(mistakes.AdminScalesBranch),
    "admin-from-variance": Defect(mistakes.AdminFromVariance),
    "lns-without-root": Defect(mistakes.LayerNormScalingWithoutRoot),
    "lns-goes-on": Defect(mistakes.LayerNormScalingGoesOn, needs_memory=True),
    "keel-counts-layers": Defect(mistakes.KeelCountsLayers),
    "keel-forgets-cross-attention": Defect(mistakes.KeelForgetsCrossAttention, needs_memory=True),
    "mix-first-layer-only": Defect(mistakes.MixFirstLayerOnly),
    "mix-by-the-other-stack": Defect(mistakes.MixByTheOtherStack, needs_memory=True),
    "hybrid-without-qkv-norm": Defect(mistakes.HybridWithoutQKVNorm),
    "hybrid-adds-input": Defect(mistakes.HybridAddsInput),
    "hybrid-cross-attention": Defect(mistakes.HybridCrossAttention, needs_memory=True),
    "hybrid-star-is-hybrid": Defect(mistakes.HybridStarIsHybrid),
    "b2t-without-bottom": Defect(mistakes.B2TWithoutBottom),
    "b2t-without-gains": Defect(mistakes.B2TWithoutGains),
    "b2t-at-cross-attention": Defect(mistakes.B2TAtCrossAttention, needs_memory=True),
    "residual-without-embedding": Defect(mistakes.ResiDualWithoutEmbedding),
    "residual-norm-of-both": Defect(mistakes.ResiDualNormOfBoth),
    "residual-eps-of-others": Defect(mistakes.ResiDualEpsOfOthers),
    "residual-scaled-full-embedding": Defect(mistakes.ScaledResiDualFullEmbedding),
    "siamese-without-two": Defect(mistakes.SiameseWithoutTwo),
    "siamese-from-raw-stream": Defect(mistakes.SiameseFromRawStream),
    "gpas-scales-gradient": Defect(mistakes.GPASScalesGradient),
    "gpas-before-sum": Defect(mistakes.GPASBeforeSum),
    "mhc-lite-takes-turns-by-layer": Defect(mistakes.MHCLiteTakesTurnsByLayer),
    "mhc-lite-writes-once": Defect(mistakes.MHCLiteWritesOnce),
    "attention-residuals-without-last-query": Defect(mistakes.AttentionResidualsWithoutLastQuery),
    "value-residual-from-before": Defect(mistakes.ValueResidualFromBefore),
}
"""at least one per placement of the package"""
