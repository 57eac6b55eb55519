"""The one sentence that a pilot ends in, by a rule that stands before the data is seen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .context_gain import ContextGain
from .far_history import FarHistory

LEAST_EFFECTS = 10
LEVEL = 0.01  # family-wise, of the far link
SHUFFLED_LEVEL = 0.05  # of the gain against shuffled far history, 19 shuffles
MOST_DETECTABLE = 0.8

Language = Literal["en", "ja"]
LANGUAGES: tuple[Language, ...] = ("en", "ja")
Answer = Literal["worth it", "no evidence", "cannot tell"]
Text = dict[str, str]  # by language

RULE = {
    "en": (
        f"Fewer than {LEAST_EFFECTS} faults: the data cannot tell. "
        f"Worth it: a cause beyond the near context precedes the faults (family-wise p ≤ {LEVEL} by shuffled blocks of "
        "time), and a model gains on held-out time from that context (95 % interval above 0, all contexts together, "
        f"and p ≤ {SHUFFLED_LEVEL} against the same context with far blocks shuffled); or a contender with the far "
        "context has a higher average precision than itself with the near one (95 % interval of the difference above "
        "0, all contenders together). "
        "A link without such a gain: the data cannot tell. "
        f"Otherwise, if a cause of {MOST_DETECTABLE:.0%} of the faults would have shown: no evidence; else the data "
        "cannot tell."
    ),
    "ja": (
        f"故障が{LEAST_EFFECTS}件未満の場合:判断できません。"
        f"価値あり:近い文脈より前の原因が故障に先行し(時間ブロックの並べ替えによる多重性調整済み p ≤ {LEVEL})、"
        "かつ未使用期間でモデルがその文脈から利得を得る場合(全文脈を通した95%区間が0を超え、"
        f"遠いブロックを並べ替えた同じ文脈に対して p ≤ {SHUFFLED_LEVEL})。"
        "または、遠い文脈を使う候補の平均適合率が、近い文脈の同じ候補を上回る場合(差の95%区間が0を超える。全候補を通して)。"
        "関連はあるがそのような利得がない場合:判断できません。"
        f"どちらもなく、故障の{MOST_DETECTABLE:.0%}に共通する原因なら検出できたはずの場合:証拠なし。それ以外は判断できません。"
    ),
}

NOT_SURE = {
    "en": "a far link, from which the cheap model does not surely gain on held-out time",
    "ja": "遠い過去との関連はありますが、簡単なモデルの未使用期間での利得は確かではありません",
}
WOULD_NOT_SHOW = {
    "en": "a far cause of most faults would not show in a record of this length",
    "ja": "この長さの記録では、大半の故障に共通する遠い原因があっても検出できません",
}
NO_FAULT = {
    "en": "the evaluation holds no fault: no detector could be judged",
    "ja": "評価期間に故障がなく、どの検出器も評価できませんでした",
}
NO_CANDIDATE = {
    "en": "no candidate cause occurs often enough",
    "ja": "十分な回数起きている原因の候補がありません",
}


@dataclass(frozen=True)
class ContenderGain:
    """Average precision of a contender with far context above that with near context, paired, with its interval."""

    far: str
    near: str
    difference: float
    low: float
    high: float


@dataclass(frozen=True)
class Verdict:
    """``answer`` by `RULE`; ``sentence``, and ``reasons``, the numbers behind it, by language."""

    answer: Answer
    sentence: Text
    reasons: tuple[Text, ...]


def duration(seconds: float, language: Language) -> str:
    """A time span in one unit, at most 3 digits."""
    units = {"en": (" min", " h", " days"), "ja": ("分", "時間", "日")}[language]
    for size, unit in ((86400, units[2]), (3600, units[1])):
        if seconds >= size:
            return f"{seconds / size:.3g}{unit}"
    return f"{seconds / 60:.3g}{units[0]}"


def decide(far: FarHistory, best_baseline: str | None, contenders: tuple[ContenderGain, ...] = ()) -> Verdict:
    """Apply `RULE`. ``best_baseline``: name of the simple detector to use where far history shows nothing; None where
    the evaluation holds no fault to judge one by.
    """
    reasons = (*_link_reasons(far), *(_contender_reason(c) for c in contenders))
    linked = far.far is not None and far.far.p <= LEVEL
    if far.effects < LEAST_EFFECTS:
        return _cannot_tell(far, (*reasons, _few(far.effects)))
    if gain := (_shown_gain(far) if linked else None) or _contender_lead(contenders):
        return _worth(far, reasons, *gain)
    if linked:
        return _cannot_tell(far, (*reasons, NOT_SURE))
    if far.detectable is None or far.detectable > MOST_DETECTABLE:
        return _cannot_tell(far, (*reasons, WOULD_NOT_SHOW))
    if best_baseline is None:
        return _cannot_tell(far, (*reasons, NO_FAULT))
    return Verdict(
        "no evidence",
        {
            "en": f"No evidence beyond {duration(far.near, 'en')}: use {best_baseline}.",
            "ja": f"{duration(far.near, 'ja')}より前の履歴が役立つ証拠はありません。{best_baseline} を使ってください。",
        },
        (*reasons, _would_show(far.detectable)),
    )


def _shown_gain(far: FarHistory) -> tuple[str, str] | None:
    """The cheap model's gain in words, English and Japanese, of the shortest context within a tenth of the best."""
    gained = [g for g in far.gains if g.multiple > 1 and g.low > 0 and g.p is not None and g.p <= SHUFFLED_LEVEL]
    if not gained:
        return None
    most = max(g.gain for g in gained)
    best = next(g for g in gained if g.gain >= 0.9 * most)
    numbers = f"{best.gain:.2f}", f"{best.low:.2f}", f"{best.high:.2f}"
    return "{} bits a fault ({} to {})".format(*numbers), "故障1件あたり{}ビット({}〜{})".format(*numbers)


def _contender_lead(contenders: tuple[ContenderGain, ...]) -> tuple[str, str] | None:
    ahead = [c for c in contenders if c.low > 0]
    if not ahead:
        return None
    lead = max(ahead, key=lambda c: c.difference)
    numbers = lead.far, f"{lead.difference:.3f}", f"{lead.low:.3f}", f"{lead.high:.3f}"
    return (
        "{1} in average precision ({2} to {3}, {0})".format(*numbers),
        "平均適合率で{1}({2}〜{3}、{0})".format(*numbers),
    )


def _worth(far: FarHistory, reasons: tuple[Text, ...], gain: str, gain_ja: str) -> Verdict:
    return Verdict(
        "worth it",
        {
            "en": f"History beyond {duration(far.near, 'en')} helps by {gain}: worth it.",
            "ja": f"{duration(far.near, 'ja')}より前の履歴は{gain_ja}役立ちます。導入する価値があります。",
        },
        reasons,
    )


def _cannot_tell(far: FarHistory, reasons: tuple[Text, ...]) -> Verdict:
    return Verdict(
        "cannot tell",
        {
            "en": f"The data cannot tell (n = {far.effects}).",
            "ja": f"このデータでは判断できません(n = {far.effects})。",
        },
        reasons,
    )


def _few(effects: int) -> Text:
    return {
        "en": f"{effects} faults, {LEAST_EFFECTS} are needed",
        "ja": f"故障は{effects}件で、{LEAST_EFFECTS}件必要です",
    }


def _would_show(share: float) -> Text:
    return {
        "en": f"a cause of {share:.0%} of the faults would have shown",
        "ja": f"故障の{share:.0%}に共通する原因なら検出できたはずです",
    }


def _link_reasons(far: FarHistory) -> tuple[Text, ...]:
    if far.far is None:
        return (NO_CANDIDATE,)
    link = far.far
    lag, low, high = ({n: duration(s, n) for n in LANGUAGES} for s in (link.lag, link.low, link.high))
    text = {
        "en": f"strongest far link: {link.source}, {lag['en']} before ({low['en']} to {high['en']}), {link.hits} of "
        f"{link.effects} faults, {link.expected:.1f} by chance, p = {link.p:.3f}",
        "ja": f"遠い過去で最も強い関連:{link.source}、{lag['ja']}前({low['ja']}〜{high['ja']})、故障{link.effects}件中"
        f"{link.hits}件(偶然なら{link.expected:.1f}件)、p = {link.p:.3f}",
    }
    return text, *(_gain_reason(gain) for gain in far.gains if gain.multiple > 1)


def _gain_reason(gain: ContextGain) -> Text:
    numbers = f"{gain.multiple:.3g}", f"{gain.gain:.2f}", f"{gain.low:.2f}", f"{gain.high:.2f}"
    return {
        "en": "{} × the near context gains {} bits a fault ({} to {})".format(*numbers),
        "ja": "近い文脈の{}倍で故障1件あたり{}ビットの利得({}〜{})".format(*numbers),
    }


def _contender_reason(gain: ContenderGain) -> Text:
    numbers = gain.far, gain.near, f"{gain.difference:+.3f}", f"{gain.low:.3f}", f"{gain.high:.3f}"
    return {
        "en": "{} against {}: {} in average precision ({} to {})".format(*numbers),
        "ja": "{} と {} の比較:平均適合率で{}({}〜{})".format(*numbers),
    }
