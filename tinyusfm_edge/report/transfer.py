"""The page of ``tinyusfm-edge transfer-set``.

Whether a made set may be used, and what it looks like.

It does not know how anything was computed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tinyusfm_edge.report.coreset import montage
from tinyusfm_edge.report.page import Block, Facts, Images, Page, Table

if TYPE_CHECKING:
    from tinyusfm_edge.training.transfer.make import TransferSet

SHOWN = 100
"""Samples shown at most."""


def transfer_page(made: TransferSet) -> Page:
    """Puts the page together.

    Args:
        made: the set and its judgement.
    """
    from tinyusfm_edge.training.transfer.judge import JUDGEMENT_HEADER

    judgement, about = made.judgement, made.about
    blocks: list[Block] = [
        Table(
            title="Judgement",
            note=(
                f"In the features of {about['teacher']['name']}, standardised over the training frames. Frechet "
                f"distances compare {judgement.compared} frames of each set with the validation frames; a sample is "
                f"too close below {judgement.limit:.3f}."
            ),
            header=JUDGEMENT_HEADER,
            rows=judgement.table(),
        )
    ]
    count = len(made.pairs.images_NSS)
    if count:
        rows = range(min(SHOWN, count))
        shown = [("images", made.pairs.images_NSS), ("masks", made.pairs.masks_NSS * 255)]
        blocks.append(
            Images(
                title="Samples",
                note=f"The first {len(rows)} of {count}.",
                images=[(name, montage(pixels, list(rows))) for name, pixels in shown],
            )
        )
    blocks.append(
        Facts(
            title="Identity",
            facts=[
                ("method", judgement.method),
                ("samples made, refused, kept", f"{judgement.drawn}, {judgement.refused}, {judgement.kept}"),
                ("training frames", str(about["training"]["frames"])),
                ("their hash", about["training"]["sha256"]),
                ("teacher's hash", about["teacher"]["sha256"]),
                ("used anyway", "yes" if about["anyway"] else "no"),
            ],
        )
    )
    headline = f"{judgement.kept} pairs by {judgement.method}: " + ("accepted" if judgement.accepted else "refused")
    lead = list(judgement.reasons)
    if about["anyway"]:
        lead.append("The set was written all the same, because that was asked for.")
    return Page(title="Transfer set", passed=judgement.accepted, headline=headline, lead=lead, blocks=blocks)


__all__ = ["SHOWN", "transfer_page"]
