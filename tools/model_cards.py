"""Print docs/models.md: this project's models and some of timm's and open_clip's, with their published weights.

    python tools/model_cards.py                     # the page
    python tools/model_cards.py > docs/models.md    # after a change of the models
    python tools/model_cards.py timm/vit_base_patch16_dinov3 open_clip/ViT-B-16    # the same for any models

Costs are counted on tensors without content: two minutes on one core, no GPU, nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Sequence

from _common import markdown_table, run_tool, tool_parser

from egohod import cli
from egohod.model.cards import model_info
from egohod.model.config import GEOMETRIES

PAGE = """# Models

Written by `python tools/model_cards.py > docs/models.md` from `egohod.model_info` (`tests/tools/test_model_cards.py` \
compares them): all models of this project, and of timm's and open_clip's those that trainings most often start from. \
`egohod.list_models("timm/*siglip*")` gives the names of others, `egohod.model_info(name, num_frames=...)` the same \
numbers for any of them, other frames or settings of the section `model`. [backbones.md](backbones.md) helps to choose.

## Sizes and cost

{sizes}

Frames are those of the published recipes, 4 or 16. Tokens are those of a clip in the vision tower, CLS and registers \
included; a slow-fast model has a slow path of 4 frames and a fast path of all. GFLOPs are 10^9 operations, two per \
multiply-add of the matrix products, of one forward pass: the vision tower for one clip, the text tower for one text \
of its context length (77 tokens, SigLIP 64, PE 32 or 72). A training step takes three times as many, on the fast path \
twice. The text tower of `timm/...` is new, CLIP's of the size that goes with the width.

## Published weights

Licences are quoted from where they are stated; this project gives no opinion on whether they hold for the weights, \
whose training data have terms of their own. *unknown*: none is recorded in what was read. \
[checkpoints.md](checkpoints.md) says how each file is loaded.

{weights}

Two paths start from the weights of the same name without `_Slowfast`. There are no published weights for the other \
models.
"""

# One or two sizes of each family that docs/backbones.md speaks of, and what two paths add.
OTHERS = [
    *("timm/vit_base_patch16_clip_224.openai", "timm/vit_base_patch16_siglip_224.v2_webli"),
    *("timm/vit_base_patch16_siglip_224.v2_webli_Slowfast", "timm/vit_so400m_patch14_siglip_378.v2_webli"),
    *("timm/vit_giantopt_patch16_siglip_384.v2_webli", "timm/eva02_base_patch16_clip_224.merged2b"),
    *("timm/eva02_large_patch14_clip_336.merged2b", "timm/vit_pe_core_base_patch16_224.fb"),
    *("timm/vit_pe_core_large_patch14_336.fb", "timm/vit_base_patch16_dinov3.lvd1689m"),
    *("timm/vit_large_patch16_dinov3.lvd1689m", "timm/vit_base_patch14_reg4_dinov2.lvd142m"),
    *("open_clip/ViT-B-16", "open_clip/ViT-H-14", "open_clip/ViT-B-16-SigLIP2", "open_clip/ViT-SO400M-14-SigLIP2-378"),
    *("open_clip/EVA02-B-16", "open_clip/EVA02-L-14-336", "open_clip/PE-Core-B-16", "open_clip/PE-Core-bigG-14-448"),
]


def main(arguments: Sequence[str]) -> int:
    parser = tool_parser(__doc__)
    parser.add_argument("names", metavar="NAME", nargs="*", help="models (default: those of the page)")
    print(page(parser.parse_args(arguments).names), end="")
    return cli.DONE


def page(names: Sequence[str] = ()) -> str:
    """The page about the models ``names``, the choice of the docs if there are none. Raises :class:`UserError`."""
    cards = [model_info(name) for name in names or [*GEOMETRIES, *OTHERS]]
    sizes = [
        (
            f"`{card.name}`",
            f"{card.vision_parameters / 1e6:.1f} M",
            f"{card.text_parameters / 1e6:.1f} M",
            f"{card.frames} x {card.resolution} px",
            f"{card.patch_size} px",
            f"{card.tokens:,}",
            str(card.embed_dim),
            f"{card.gflops:,.{1 if card.gflops >= 10 else 2}f}",
            f"{card.text_gflops:.{1 if card.text_gflops >= 1 else 2}f}",
        )
        for card in cards
    ]
    head = ["name", "vision", "text", "clip", "patch", "tokens", "shared space", "GFLOPs a clip", "a text"]
    # Those of two paths are the backbone's.
    plain = [card for card in cards if not card.name.endswith("_Slowfast")]
    weights = [(f"`{card.name}`", *each[:3], each.stated) for card in plain for each in card.weights]
    sources = ["model", "weights", "source", "licence", "stated in"]
    return PAGE.format(
        sizes="\n".join(markdown_table(head, sizes)), weights="\n".join(markdown_table(sources, weights))
    )


if __name__ == "__main__":
    run_tool(main)
