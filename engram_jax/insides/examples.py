"""Sentences whose gates the paper shows (arXiv 2601.07372, figure 7)."""

GATED = (
    "Only Alexander the Great could tame the horse Bucephalus.",
    "By the way, I am a fan of the Milky Way.",
    "This study analyzes the media impact of Diana, Princess of Wales.",
    "中国四大发明包括：造纸术、指南针、火药和印刷术。",
    "东汉末年名医张仲景，因其卓越的贡献被后世尊称为‘医圣’，并著有传世巨作《伤寒杂病论》。",
)
