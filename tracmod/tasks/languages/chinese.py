"""Chinese: no inflection, classifiers, time and place before the verb, no spaces."""

from __future__ import annotations

from tracmod.tasks.languages.base import Language
from tracmod.tasks.meaning import Deed, Event, Person, Review, State

PEOPLE = {
    "man": "男人",
    "woman": "女人",
    "boy": "男孩",
    "girl": "女孩",
    "teacher": "老师",
    "doctor": "医生",
    "farmer": "农民",
    "nurse": "护士",
    "king": "国王",
    "queen": "女王",
    "singer": "歌手",
    "neighbour": "邻居",
}
# form before a noun (with 的), form as a predicate (after 很 or 不)
QUALITIES = {
    "rich": ("富有", "富有"),
    "poor": ("贫穷", "贫穷"),
    "happy": ("快乐", "快乐"),
    "sad": ("悲伤", "悲伤"),
    "strong": ("强壮", "强壮"),
    "weak": ("虚弱", "虚弱"),
    "tall": ("高大", "高大"),
    "short": ("矮小", "矮小"),
}
ACTIONS = {
    "eat": "吃",
    "drink": "喝",
    "read": "阅读",
    "draw": "画",
    "cook": "做",
    "sleep": "睡觉",
    "work": "工作",
    "sing": "唱歌",
    "dance": "跳舞",
    "wait": "等待",
}
DEEDS = {
    "see": "看见",
    "hear": "听见",
    "greet": "问候",
    "seek": "寻找",
    "meet": "遇见",
    "photograph": "拍摄",
}
# classifier and noun
THINGS = {
    "apple": ("个", "苹果"),
    "pear": ("个", "梨"),
    "carrot": ("根", "胡萝卜"),
    "onion": ("个", "洋葱"),
    "tea": ("杯", "茶"),
    "coffee": ("杯", "咖啡"),
    "water": ("杯", "水"),
    "milk": ("杯", "牛奶"),
    "book": ("本", "书"),
    "newspaper": ("份", "报纸"),
    "letter": ("封", "信"),
    "poem": ("首", "诗"),
    "dog": ("只", "狗"),
    "cat": ("只", "猫"),
    "tree": ("棵", "树"),
    "flower": ("朵", "花"),
    "soup": ("碗", "汤"),
    "fish": ("条", "鱼"),
    "rice": ("碗", "米饭"),
}
PLACES = {
    "park": "在公园里",
    "kitchen": "在厨房里",
    "garden": "在花园里",
    "school": "在学校里",
    "library": "在图书馆里",
    "station": "在车站",
    "market": "在市场上",
    "hospital": "在医院里",
}
TIMES = {"morning": "早上", "evening": "晚上"}
PRODUCTS = {
    "lamp": ("盏", "灯"),
    "book": ("本", "书"),
    "bag": ("个", "包"),
    "phone": ("部", "手机"),
    "clock": ("个", "闹钟"),
    "chair": ("把", "椅子"),
    "camera": ("台", "相机"),
    "coat": ("件", "外套"),
    "table": ("张", "桌子"),
    "shirt": ("件", "衬衫"),
}
ASPECTS = {
    "quality": "质量",
    "price": "价格",
    "material": "材料",
    "design": "设计",
    "colour": "颜色",
    "packaging": "包装",
    "delivery": "配送",
    "size": "尺寸",
}
VERDICTS = {
    "terrible": "糟糕",
    "horrible": "可怕",
    "bad": "差",
    "disappointing": "令人失望",
    "acceptable": "一般",
    "normal": "普通",
    "good": "好",
    "nice": "不错",
    "excellent": "出色",
    "perfect": "完美",
}

COMMA = "\N{FULLWIDTH COMMA}"


class Chinese(Language):
    """Subject, time, negation, place, verb, object."""

    def event(self, event: Event) -> str:
        return _sentence(
            _person(event.subject),
            TIMES[event.time] if event.time else "",
            "不" if event.negated else "",
            PLACES[event.place] if event.place else "",
            ACTIONS[event.action],
            _this(THINGS[event.thing]) if event.thing else "",
        )

    def state(self, state: State) -> str:
        negation = "不" if state.negated else ""
        time = TIMES[state.time] if state.time else ""
        if state.place:
            return _sentence(_person(state.subject), time, negation, PLACES[state.place])
        predicate = QUALITIES[state.quality or ""][1]
        return _sentence(_person(state.subject), time, negation or "很", predicate)

    def deed(self, deed: Deed) -> str:
        subject, time = _person(deed.subject), TIMES[deed.time]
        clause = ("没" if deed.negated else "") + DEEDS[deed.deed] + _person(deed.other)
        if deed.time_first:
            return _sentence(time, COMMA, subject, clause)
        return _sentence(subject, time, clause)

    def review(self, review: Review) -> str:
        first, second = (
            f"{ASPECTS[aspect]}{'非常' if strong else '很'}{VERDICTS[verdict]}"
            for aspect, verdict, strong in review.verdicts
        )
        joint = COMMA + "但是" if review.contrast else COMMA
        return _sentence("我买了", _this(PRODUCTS[review.product])) + _sentence(
            first, joint, second
        )


def _sentence(*parts: str) -> str:
    return "".join(parts) + "。"


def _person(person: Person) -> str:
    owner, noun = "", PEOPLE[person.noun]
    if person.nephew:
        owner, noun = f"{noun}的", "侄子"
    quality = f"{QUALITIES[person.quality][0]}的" if person.quality else ""
    return owner + quality + noun


def _this(thing: tuple[str, str]) -> str:
    classifier, noun = thing
    return f"这{classifier}{noun}"
