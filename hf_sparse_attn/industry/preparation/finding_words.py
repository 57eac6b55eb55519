"""What each kind of finding says and what to do about it, in English and Japanese."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class KindWords:
    """Title, one plain sentence, and what to do, of one kind of finding in one language."""

    title: str
    sentence: str
    advice: str


_ENGLISH = {
    "bad_line": (
        "Lines that could not be read",
        "A line does not have the form of its file and was left out.",
        "Open the file at this line. If it is damaged, export it again; if it is a header or a note, remove it.",
    ),
    "time_unreadable": (
        "Time stamps that could not be read",
        "A time stamp has a form that is not known, and its row was left out.",
        "Name the form of the time stamps when you prepare the data, or correct the rows.",
    ),
    "time_ambiguous": (
        "Time stamps with more than one meaning",
        "The time stamps can be read in more than one way.",
        "Compare one event with a time that you know, then name the form of the time stamps and prepare again.",
    ),
    "day_first_dates": (
        "Day before month",
        "The dates of this file have the day before the month, and were read like that.",
        "Check one date that you know. If it is wrong, name the form of the dates and prepare again.",
    ),
    "dst_fold": (
        "An hour that occurs twice",
        "The clock was put back, so one hour of local time occurs twice.",
        "Let the logger write UTC. Until then, do not compare times of this hour between files.",
    ),
    "dst_gap": (
        "Times that do not exist",
        "The clock was put forward, and there are rows in the hour that was left out.",
        "Check the time zone that was named for this file: these times do not exist in it.",
    ),
    "zone_change": (
        "The time zone changes",
        "The time zone of this file changes in the middle.",
        "Ask who set the logger's clock at this time, and prepare the two parts with a zone each.",
    ),
    "epoch_unit_change": (
        "The unit of time stamps changes",
        "Numeric time stamps change between seconds, milliseconds and the like.",
        "Check the first row after the change, and split the file there if it was read wrongly.",
    ),
    "duplicates": (
        "Repeated rows",
        "Rows occur twice; the repetitions are marked and do not count.",
        "Nothing has to be done for the analysis. If there are many, check the export for overlapping periods.",
    ),
    "backward_jump": (
        "Time runs backwards",
        "Time stamps run backwards; the rows stay as they stand.",
        "Check whether the logger's clock was set, or files were joined in the wrong order.",
    ),
    "equal_stamps": (
        "Equal time stamps",
        "Several rows of one sensor have the same time stamp and different values.",
        "Export with fractions of seconds. If two sensors share a name, give each its own.",
    ),
    "clock_offset": (
        "A clock is off",
        "The clock of this file is ahead (a positive offset) or behind against the reference.",
        "Have the logger's clock synchronised, and prepare again with clock correction. A steady delay of the process"
        " looks the same: check one event in both files.",
    ),
    "clock_unverified": (
        "A clock could not be compared",
        "The clock of this file cannot be verified: nothing in it moves together with the other files.",
        "Compare one event that stands in both files by hand, such as a start of the machine.",
    ),
    "gap": (
        "Stretches without data",
        "Here is a stretch without data.",
        "Find out whether the logger, the network or the machine was off. No model can learn from what is missing.",
    ),
    "stuck_sensor": (
        "Stuck sensors",
        "The sensor repeats one value for far longer than it ever does in this state of the machine.",
        "Check the sensor, its cable and the gateway. These readings are marked and are no basis for alarms.",
    ),
    "flat_sensor": (
        "Sensors that hardly move",
        "The sensor moves far less than it usually does in this state of the machine.",
        "Check whether the sensor is fouled, loose or filtered. These readings are marked.",
    ),
    "saturated_sensor": (
        "Sensors on their limit",
        "The readings are cut off at one value, as on the limit of a range.",
        "Check the measuring range of the sensor and of the input. What lies beyond the limit is lost.",
    ),
    "unit_change": (
        "The unit changes",
        "From here on the readings lie in another unit.",
        "Ask who changed the sensor or its settings, and correct the unit of this stretch before training.",
    ),
    "no_number": (
        "Fields without a number",
        "Fields of this sensor hold no number; they count as missing.",
        "Look at the first such row. If the text has a meaning, such as OFF, name it when you prepare the data.",
    ),
    "empty_channel": (
        "Sensors without readings",
        "There is not a single number of this sensor.",
        "Leave the column out, or check the export and the name of the sensor.",
    ),
    "short_record": (
        "Too little data",
        "The record is too short to train on one part and evaluate on another.",
        "Export a longer period, or plan a shorter context.",
    ),
}

_JAPANESE = {
    "bad_line": (
        "読み取れない行",
        "ファイルの形式に合わない行があり、除外しました。",
        "ファイルの該当行を確認してください。破損している場合は再度エクスポートし、見出しや注記であれば削除してください。",
    ),
    "time_unreadable": (
        "読み取れない時刻",
        "時刻の形式が不明なため、その行を除外しました。",
        "データ準備時に時刻の形式を指定するか、該当行を修正してください。",
    ),
    "time_ambiguous": (
        "複数の読み方ができる時刻",
        "時刻の読み方が一つに決まりません。",
        "時刻が分かっている出来事と照合し、時刻の形式を指定して準備をやり直してください。",
    ),
    "day_first_dates": (
        "日が月より前の日付",
        "このファイルの日付は日・月の順で書かれており、そのように読み取りました。",
        "分かっている日付を一つ確認してください。誤りであれば日付の形式を指定して準備をやり直してください。",
    ),
    "dst_fold": (
        "二度現れる一時間",
        "時計が戻されたため、現地時刻の一時間が二度現れます。",
        "記録装置が協定世界時で書くように設定してください。それまではこの一時間をファイル間で比較しないでください。",
    ),
    "dst_gap": (
        "存在しない時刻",
        "時計が進められて飛ばされた一時間の中に行があります。",
        "このファイルに指定した時間帯を確認してください。これらの時刻はその時間帯には存在しません。",
    ),
    "zone_change": (
        "時間帯の変更",
        "このファイルの途中で時間帯が変わっています。",
        "この時期に記録装置の時計を設定した人に確認し、二つの部分をそれぞれの時間帯で準備してください。",
    ),
    "epoch_unit_change": (
        "時刻の単位の変更",
        "数値の時刻の単位が、秒やミリ秒などの間で変わっています。",
        "変更後の最初の行を確認し、誤って読まれていればそこでファイルを分けてください。",
    ),
    "duplicates": (
        "重複した行",
        "同じ行が二度現れます。繰り返しには印を付け、数えません。",
        "分析のための対応は不要です。多い場合は、エクスポートの期間が重なっていないか確認してください。",
    ),
    "backward_jump": (
        "時刻の逆行",
        "時刻が逆行しています。行の順序は元のままです。",
        "記録装置の時計が変更されたか、ファイルが誤った順で結合されていないか確認してください。",
    ),
    "equal_stamps": (
        "同一の時刻",
        "一つのセンサーで、同じ時刻に値の異なる行が複数あります。",
        "秒未満を含めてエクスポートしてください。二つのセンサーが同じ名前であれば、別の名前にしてください。",
    ),
    "clock_offset": (
        "時計のずれ",
        "このファイルの時計は、基準に対して進んで（正の値）または遅れています。",
        "記録装置の時計を同期し、時計補正を有効にして準備をやり直してください。"
        "工程の一定の遅れも同じように見えるため、両方のファイルで一つの出来事を確認してください。",
    ),
    "clock_unverified": (
        "比較できない時計",
        "このファイルの時計は検証できません。他のファイルと連動する動きがありません。",
        "機械の起動など、両方のファイルにある出来事を一つ選び、手作業で比較してください。",
    ),
    "gap": (
        "データのない区間",
        "データのない区間があります。",
        "記録装置、通信、機械のいずれが止まっていたか確認してください。欠けた部分からモデルは学習できません。",
    ),
    "stuck_sensor": (
        "固着したセンサー",
        "この運転状態としては異常に長い間、センサーが同じ値を繰り返しています。",
        "センサー、配線、ゲートウェイを確認してください。該当する値には印を付け、警報の根拠にはしません。",
    ),
    "flat_sensor": (
        "ほとんど動かないセンサー",
        "この運転状態での通常に比べ、センサーの動きが極端に小さくなっています。",
        "センサーの汚れ、緩み、フィルター設定を確認してください。該当する値には印を付けています。",
    ),
    "saturated_sensor": (
        "上限・下限に張り付くセンサー",
        "測定範囲の限界のように、値がある水準で切り取られています。",
        "センサーと入力の測定範囲を確認してください。限界を超えた部分は失われています。",
    ),
    "unit_change": (
        "単位の変更",
        "ここから値が別の単位になっています。",
        "センサーまたは設定を変更した人に確認し、学習の前にこの区間の単位を直してください。",
    ),
    "no_number": (
        "数値でない項目",
        "このセンサーに数値でない項目があり、欠測として扱います。",
        "最初の該当行を確認してください。停止などの意味を持つ文字であれば、データ準備時に指定してください。",
    ),
    "empty_channel": (
        "値のないセンサー",
        "このセンサーの数値が一つもありません。",
        "列を除くか、エクスポートとセンサー名を確認してください。",
    ),
    "short_record": (
        "データ不足",
        "記録が短く、学習用と評価用に分けられません。",
        "より長い期間をエクスポートするか、より短い文脈を計画してください。",
    ),
}

KIND_WORDS: dict[str, dict[str, KindWords]] = {
    "en": {kind: KindWords(*words) for kind, words in _ENGLISH.items()},
    "ja": {kind: KindWords(*words) for kind, words in _JAPANESE.items()},
}
