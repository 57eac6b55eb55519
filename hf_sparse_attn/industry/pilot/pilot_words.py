"""Words of the pilot's page and table in English and Japanese."""

from __future__ import annotations

import re

from .verdict import Answer, Language

WORDS: dict[str, dict[str, str]] = {
    "en": {
        "title": "Pilot: does far history help here?",
        "verdict": "Verdict",
        "worth it": "Worth it",
        "no evidence": "No evidence",
        "cannot tell": "Cannot tell",
        "reasons": "The numbers behind it",
        "rule": "The rule, written before the data was seen",
        "gain": "Gain against context",
        "gain_note": "Bits a fault that a cheap model gains on held-out time; bars are 95 % intervals of all contexts "
        "together. 1× is the near context against a constant rate, the others are against 1×. Open circles: the mean "
        "of the same context with its far blocks shuffled.",
        "no_gain": "There was no candidate cause or no fault: no gain was measured.",
        "bits": "bits a fault",
        "context": "Context",
        "length": "Length",
        "interval": "95 % interval",
        "shuffled": "Far blocks shuffled",
        "p": "p against shuffled",
        "data": "data",
        "lag": "The lag that was found",
        "anywhere": "Strongest link at any lag",
        "far": "Strongest link beyond the near context",
        "link": "{source}: {lag} before ({low} to {high}); {hits} of {effects} faults, {expected} by chance; p = {p}",
        "link_note": "The median and the 10 and 90 % quantiles of the time from the candidate to the fault. p is for "
        "all candidates and lags together, by shuffled blocks of time. With p above {level} it counts as none.",
        "none": "none",
        "detectors": "All detectors at one alarm budget",
        "detectors_note": "On the evaluation period, with 95 % intervals by drawn blocks of time or assets. Random "
        "scores reach the base rate. An alarm counts within a fault, {ahead} before it and {tolerance} around; after "
        "an alarm {cool_down} pass without another.",
        "detector": "Detector",
        "average_precision": "Average precision",
        "vus_pr": "VUS-PR",
        "event_f1": "Event F1",
        "event_recall": "Share of faults found",
        "found": "Found (n)",
        "alarms": "Alarms",
        "lead_hours": "Lead time in hours",
        "alarms_a_day": "Alarms a day",
        "alarms_a_day_note": "Alarms a day are those at the threshold that keeps the budget in training: what a plant "
        "would see. Event F1, faults found, alarms and lead time are at the budget in the evaluation.",
        "found_of": "{found} of {faults}",
        "seeds": "{n} seeds: {low} to {high}",
        "not_available": "not available",
        "judged": "What was judged",
        "assets": "Machines",
        "days": "Days of evaluation, all machines",
        "faults": "Faults in the evaluation",
        "effects": "Faults for the test of history",
        "base_rate": "Base rate (steps with a fault)",
        "vus_base_rate": "VUS-PR of random scores",
        "budget": "Alarm budget a machine",
        "budget_value": "one in {days}",
        "near": "Near context",
        "longest": "Longest lag looked at",
        "block": "Blocks of time that are shuffled",
        "candidates": "Candidate causes",
        "shuffles": "Shuffles",
        "detectable": "Smallest share of faults that would have shown",
        "target": "Events to be explained",
        "notes": "Notes",
        "point_adjusted": "Why there is no point-adjusted F1",
        "point_adjusted_why": "It counts a whole fault as found as soon as one of its steps is hit, so that random "
        "scores reach 0.68 to 0.98 on usual data sets: it cannot tell a detector from chance.",
        "command": "Command",
        "base_rate_line": "Base rate {base_rate}, VUS-PR of random scores {vus}; {faults} faults in {days} days",
    },
    "ja": {
        "title": "パイロット:遠い過去の履歴は役立つか",
        "verdict": "判定",
        "worth it": "価値あり",
        "no evidence": "証拠なし",
        "cannot tell": "判断不可",
        "reasons": "根拠となる数値",
        "rule": "判定の規則(データを見る前に定めたもの)",
        "gain": "文脈の長さと利得",
        "gain_note": "簡単なモデルが未使用期間で得る故障1件あたりの利得(ビット)。縦棒は全文脈を通した95%区間。"
        "1×は一定の発生率に対する近い文脈の利得、その他は1×に対する利得。白丸は遠いブロックを並べ替えた同じ文脈の平均。",
        "no_gain": "原因の候補または故障がないため、利得は測定していません。",
        "bits": "ビット/故障",
        "context": "文脈",
        "length": "長さ",
        "interval": "95%区間",
        "shuffled": "遠いブロックを並べ替え",
        "p": "並べ替えに対する p",
        "data": "データ",
        "lag": "見つかった時間差",
        "anywhere": "全時間差で最も強い関連",
        "far": "近い文脈より前で最も強い関連",
        "link": "{source}:{lag}前({low}〜{high})。故障{effects}件中{hits}件、偶然なら{expected}件。p = {p}",
        "link_note": "候補から故障までの時間の中央値と10%・90%分位点です。p は全候補・全時間差を通した値で、"
        "時間ブロックの並べ替えによります。p が{level}を超えるものは関連とみなしません。",
        "none": "なし",
        "detectors": "同じ警報予算での全検出器",
        "detectors_note": "評価期間での値と、時間ブロックまたは機械の再抽出による95%区間。"
        "ランダムなスコアは基準率になります。警報は故障中、その{ahead}前から、前後{tolerance}以内で有効です。警報の後{cool_down}は次の警報を出しません。",
        "detector": "検出器",
        "average_precision": "平均適合率",
        "vus_pr": "VUS-PR",
        "event_f1": "イベントF1",
        "event_recall": "検出した故障の割合",
        "found": "検出数(n)",
        "alarms": "警報数",
        "lead_hours": "先行時間(時間)",
        "alarms_a_day": "1日あたりの警報",
        "alarms_a_day_note": "「1日あたりの警報」は学習期間で予算を守るしきい値での数で、現場で実際に見る数です。"
        "イベントF1・検出数・警報数・先行時間は、評価期間で予算を守るしきい値での値です。",
        "found_of": "{faults}件中{found}件",
        "seeds": "シード{n}個:{low}〜{high}",
        "not_available": "実行不可",
        "judged": "評価の対象",
        "assets": "機械",
        "days": "評価日数(全機械の合計)",
        "faults": "評価期間の故障",
        "effects": "履歴の検定に使う故障",
        "base_rate": "基準率(故障中のステップ)",
        "vus_base_rate": "ランダムなスコアのVUS-PR",
        "budget": "機械ごとの警報予算",
        "budget_value": "{days}に1回",
        "near": "近い文脈",
        "longest": "調べた最長の時間差",
        "block": "並べ替える時間ブロック",
        "candidates": "原因の候補",
        "shuffles": "並べ替え回数",
        "detectable": "検出できたはずの最小の故障割合",
        "target": "説明する事象",
        "notes": "注記",
        "point_adjusted": "point-adjusted F1 を使わない理由",
        "point_adjusted_why": "故障区間の1ステップでも当たれば区間全体を検出とみなすため、"
        "よく使われるデータでランダムなスコアでも0.68〜0.98に達し、検出器と偶然を区別できません。",
        "command": "コマンド",
        "base_rate_line": "基準率 {base_rate}、ランダムなスコアのVUS-PR {vus}。{days}日間に故障{faults}件",
    },
}

ANSWERS: tuple[Answer, ...] = ("worth it", "no evidence", "cannot tell")

DETECTORS_JA = {
    "random": "ランダム",
    "max |z|": "最大 |z|",
    "EWMA": "指数加重移動平均",
    "new template": "新しいテンプレート",
    "event-count PCA": "イベント数の主成分分析",
    "n-gram of events": "イベントの n-gram",
    "isolation forest": "アイソレーションフォレスト",
    "HBOS (PyOD)": "ヒストグラム外れ値",
    "matrix profile (left)": "行列プロファイル(過去のみ)",
    "seasonal naive residual": "季節ナイーブ予測の残差",
    "gradient boosting residual": "勾配ブースティング予測の残差",
    "gradient boosting, failure ahead": "勾配ブースティングによる故障予測",
    "pretrained forecaster residual": "事前学習済み予測モデルの残差",
}

# sentences of detectors and timelines: pattern in English, the same in Japanese
SENTENCES_JA = {
    r"(\d+) faults in training, (\d+) needed": r"学習期間の故障は\1件で、\2件必要です",
    r"([\d.]+) days of training, more than ([\d.]+) needed": r"学習期間は\1日で、\2日を超える長さが必要です",
    r"no readings of sensors in training": r"学習期間にセンサーの測定値がありません",
    r"no log events in training": r"学習期間にログのイベントがありません",
    r"neither readings nor events in training": r"学習期間に測定値もイベントもありません",
    r"no checkpoint of TimesFM was named": r"TimesFM のチェックポイントが指定されていません",
    r"(.+) is no folder with a checkpoint": r"\1 はチェックポイントのフォルダーではありません",
    r"(\d+) of (\d+) kinds of events are counted together as (.+)": r"\2種類のイベントのうち\1種類を \3 にまとめました",
    r"(\d+) rows share a step with another; their mean stands": r"\1行が他の行と同じステップにあり、平均を使いました",
    r"(\d+) of (\d+) faults lie outside of the record": r"故障\2件のうち\1件は記録の期間外です",
    r"kinds of faults judged together: (.+)": r"まとめて評価した故障の種類:\1",
}


def sentence(text: str, language: Language) -> str:
    """A sentence of a detector or a timeline, after the name of its asset, in a language; unknown ones as they are."""
    if language == "ja":
        for pattern, japanese in SENTENCES_JA.items():
            if found := re.fullmatch(rf"(?P<asset>.*: )?(?P<said>{pattern})", text, re.DOTALL):
                return (found["asset"] or "") + re.sub(pattern, japanese, found["said"], flags=re.DOTALL)
    return text


def detector_name(name: str, language: Language) -> str:
    """The name of a detector; in Japanese with its English one, which the verdict uses."""
    japanese = DETECTORS_JA.get(name) if language == "ja" else None
    return f"{japanese} ({name})" if japanese else name
