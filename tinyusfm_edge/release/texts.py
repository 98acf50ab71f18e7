"""What people must know about each student that may be shipped.

Data, licence, use, limits. No measured number.

It does not know weights or scores; card.py puts both together.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tinyusfm_runtime.errors import InputError


@dataclass(frozen=True, kw_only=True, slots=True)
class StudentText:
    """Words about a student.

    Attributes:
        task: ``segment`` or ``classify``.
        labels: names of the outputs.
        postprocess: what is made of the logits.
        licence: of the weights.
        origin: where they come from, one line.
        intended_use: one line.
        data: name, title, licence, citation and doi of the data; ``others``, for credit, where training had more.
        limits: what has not been tested, one item a sentence or two.
        opt_in: why the student must be asked for by name, or empty.
        demo_only: why its readings show no more than that the tools work, or empty.
    """

    task: str
    labels: tuple[str, ...]
    postprocess: str
    licence: str
    origin: str
    intended_use: str
    data: dict[str, str]
    limits: tuple[str, ...]
    opt_in: str = ""
    demo_only: str = ""
    grouping: str = field(default="Split by patient: no patient stands in two splits.")


TEXTS = {
    "fetal-head": StudentText(
        task="segment",
        labels=("fetal_head",),
        postprocess="ellipse_hc",
        licence="CC-BY-4.0",
        origin=(
            "trained from HC18 (van den Heuvel et al. 2018, doi:10.5281/zenodo.1327317), phantoms, and frames of "
            "other organs that hold no head"
        ),
        intended_use="research on head circumference in standard planes; not a medical device",
        data={
            "name": "HC18",
            "title": "Automated measurement of fetal head circumference using 2D ultrasound images, training set",
            "licence": "CC BY 4.0",
            "citation": (
                "van den Heuvel TLA, de Bruijn D, de Korte CL, van Ginneken B. Automated measurement of fetal head "
                "circumference using 2D ultrasound images. PLoS ONE 13(8):e0200412, 2018"
            ),
            "doi": "10.5281/zenodo.1327317",
            "others": (
                "Frames without a head: muscle from TimTrack's example images (van der Zee and Kuo; ds1 and ds2 "
                "CC0-1.0, ds3 by Drazan, Hullfish and Baxter and ds4 by Seynnes and Cronin CC BY 4.0), lung from "
                "the POCUS collection (Born et al., Applied Sciences 11(2):672, 2021; only files whose own licence is "
                "CC BY 4.0 or CC BY 2.0), and cines of heart and abdomen from sonocrop and of eyes from ITKPOCUS (both "
                "Apache-2.0) and pydicom's example cine of a heart (MIT)."
            ),
        },
        limits=(
            "Standard planes of one hospital's two scanner types, as HC18 holds them; other scanners, planes, "
            "gestational ages and pathologies have **not been tested**, and no external set has.",
            "It was taught to mark nothing on muscle, lung, heart, abdomen and eye; on other organs it may still mark "
            "something. Nothing here says whether a frame is a standard plane.",
            "Frames are the split's compact copies (short side at most 256 pixels, JPEG).",
            "Phantoms and the cine that export and demo use were in training: results on them show that a conversion "
            "is right, not how well patients are segmented.",
        ),
    ),
    "breast-lesion": StudentText(
        task="classify",
        labels=("benign", "malignant", "normal"),
        postprocess="none",
        licence="LicenseRef-BUSI-not-stated",
        origin="trained from BUSI (Al-Dhabyani et al. 2020, doi:10.1016/j.dib.2019.104863)",
        intended_use="research on breast lesion classification; not a medical device",
        data={
            "name": "BUSI",
            "title": "Breast Ultrasound Images, without near duplicates and conflicting labels",
            "licence": "not stated at its source; MedMNIST lists BreastMNIST, made from the same images, as CC BY 4.0",
            "citation": (
                "Al-Dhabyani W, Gomaa M, Khaled H, Fahmy A. Dataset of breast ultrasound images. Data in Brief "
                "28:104863, 2020"
            ),
            "doi": "10.1016/j.dib.2019.104863",
        },
        limits=(
            "One hospital's images; they carry no patient ids, so the groups are clusters of similar images, and "
            "one patient may stand in two splits.",
            "Known faults of the set (Pawlowska et al., Data in Brief 2023): near duplicates and lesions filed under "
            "two classes (both left out here), axilla images, callipers and text burnt into images. A network can "
            "learn callipers: they mark lesions.",
            "Tried on 51 images of two other sources, all of which show a lesion: AUC 0.50 and 0.66, and 22 were read "
            "as normal.",
            "The class shares are the set's, not those of a clinic: probabilities do not carry over.",
            "Frames are the split's compact copies (short side at most 256 pixels, JPEG).",
        ),
        opt_in=(
            "the licence of BUSI, the data it was trained from, is not stated at its source: check it before any use "
            "beyond research"
        ),
        demo_only=(
            "on breast images from elsewhere it is near chance (AUC 0.50 and 0.66 on two sources, 22 of 51 lesions "
            "read as normal). It shows how a classifier is exported and run; nothing that it says about a breast is "
            "usable"
        ),
        grouping=("Split by cluster of similar images, since the set names no patients; flagged images are left out."),
    ),
}
"""Name -> words."""


def text_of(name: str) -> StudentText:
    """The words about a student.

    Raises:
        InputError: nothing is known about it.
    """
    if name not in TEXTS:
        raise InputError(f"nothing is known about a student {name!r}: describe it in student_texts.py")
    return TEXTS[name]


__all__ = ["TEXTS", "StudentText", "text_of"]
