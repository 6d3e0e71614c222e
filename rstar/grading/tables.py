"""Notation that is spelt in several ways, by name."""

from __future__ import annotations


def table(text: str) -> dict[str, str]:
    """`name: spelling spelling ...` lines as spelling -> name; a name is a spelling of itself."""
    found: dict[str, str] = {}
    for line in text.strip().splitlines():
        name, _, spellings = line.partition(":")
        found |= dict.fromkeys((name.strip(), *spellings.split()), name.strip())
    return found


CURRENCIES = {"$": "dollars", "\u20ac": "euros", "\u00a3": "pounds", "\u00a5": "yen", "\u20b9": "rupees"}


def names(text: str) -> frozenset[str]:
    """Names apart by spaces."""
    return frozenset(text.split())


MEASURES = table("""
    mm: millimeter millimetre
    cm: centimeter centimetre
    dm: decimeter decimetre
    meter: metre m
    km: kilometer kilometre
    inch: in inche
    foot: feet ft
    yard: yd
    mile: mi
    dollar: usd buck
    cent: ¢
    euro: eur
    pound: lb
    yen:
    rupee:
    peso:
    penny: pennie
    ounce: oz
    gram: g
    mg: milligram
    kilogram: kg kilo
    ton: tonne
    second: sec s
    ms: millisecond
    minute: min
    hour: hr h
    day:
    week:
    month:
    year: yr
    decade:
    century: centurie
    degree: deg
    radian: rad
    percent: percentage pct
    liter: litre l
    ml: milliliter millilitre
    gallon: gal
    quart: qt
    pint: pt
    acre:
    hectare: ha
    newton: n
    joule: j
    watt: w
    kilowatt: kw
    volt: v
    ohm:
    hertz: hz
    byte:
    calorie: cal
    celsius: c
    fahrenheit: f
    knot:
    dozen:
""")
"""Units whose difference matters: 5 cm is not 5 m. Looked up in the singular and in lower case."""

COMPOUND = {
    "mph": ("mile", "per", "hour"), "kph": ("km", "per", "hour"), "kmh": ("km", "per", "hour"),
    "mpg": ("mile", "per", "gallon"), "fps": ("foot", "per", "second"), "rpm": ("per", "minute"),
}  # fmt: skip

ATTACHED = names(
    """
    mm cm km mg kg ml mL lb lbs ft oz hr hrs min sec mph kph kmh ms deg rad
    """
)
"""Written right behind a number: 5cm. Other letters there are variables."""

COUNTED = names(
    """
    acorn adult airplane animal ant apple apricot arm arrangement article atom author avocado award baby bag
    bagel baker ball balloon banana band bar barrel basket basketball bat batch battery beach bead bean bear bed
    bee beetle berry bicycle bike bill bird biscuit bit block blueberry board boat bolt bone book booklet bottle
    bouquet bowl box boy bracelet branch bread brick bridge brother brownie brush bucket bug building bulb
    bullet bunch bunny burger bus bush butterfly button cabinet cake camper can candle candy cap car card
    carnation carrot cartoon case cat caterpillar cell cent chair chapter cherry chick chicken child children
    chip chocolate choice choir circle citizen city class classroom client clip clock clothes cloud coat coconut
    code coffee coin color colour combination comic committee computer cone container contestant cookie cost cot
    country couple coupon cousin cow cracker crate crayon cricket crop cube cucumber cup cupcake customer
    daffodil daisy daughter deer desk diagonal dice die digit dime dinner dish divisor doctor dog doll dolphin
    donkey donut door dot doughnut dress drink driver driveway drop duck ear earring edge egg element elephant
    email employee engine envelope episode eraser error event exam eye face factor factory family fan farm
    farmer fence finger fireman fish flag flavor flight flock floor flower fly follower fork fox frame freshman
    friend frog fruit function gadget game garden geese gem gentleman gift giraffe girl glass gnome goal goat
    goldfish goose grade grandchild grandchildren grape grapefruit graph group guest guitar gumball guppy hair
    haircut hamster hand handshake hat head hen hiker hole home horse hotdog hotel house human hunter insect
    instrument integer invitation item jacket jar jelly jellybean jewel job journal juice jump key kid kitchen
    kite kitten knife ladder lady lamb lamp lap laps leaf leaves leg lemon lemonade lesson letter level light
    lily line lion lizard log lollipop machine magazine magnet man mango map marble mark marker marshmallow mask
    match matchstick meal meatball member men message mice mile mint mistake molecule monkey motorcycle mountain
    mouse movie muffin mug mushroom nail name napkin necklace nest newspaper nickel night note notebook number
    nut object onion orange orchid order outcome outfit owl oyster pack package packet page pail paint painting
    pair pamphlet pancake panda pants paper paperclip parent park part participant party passenger path patient
    peach peanut pear pearl pebble peg pen pencil penguin pennies penny people permutation person pet petal
    phone photo photograph piano picture pie piece pig pigeon pill pillow pin pineapple pizza place plane planet
    plank plant plate player plot plum poem point polygon pool poster pot potato pound present prize problem
    program pumpkin pupil puppy purse puzzle question rabbit raccoon raisin rat recipe rectangle region
    ribbon rice ring rock roll room rooster root rope rose round route row ruler sack salad sandwich scarf
    scarves school scoop score seashell seat section sedan seed sentence sequence serving set shade shark sheep
    sheet shelf shell shelves ship shirt shoe shop shot shovel shrimp sibling side singer sister skirt slice
    snack snail snake snowball soccer sock soda sofa soldier solution son song soup spider spoke spoon spot
    square squirrel stair stamp star state statue step stick sticker stone store story straw strawberry street
    string stripe striped student subset suit suitcase sunflower sweater sweet swimmer table tablespoon tadpole
    tail tank tape task tea teacher team teaspoon teeth television tennis term test text thing ticket tie tiger
    tile time tire tissue title toad token tomato tool toonie tooth total touchdown towel tower town toy tractor
    train trap trash tray treat tree triangle tricycle trip triplet trophy truck tube tulip tuple turkey turn
    turtle tv unit user value van vase vegetable vehicle vertex vertice vertices vest video village visitor
    volunteer vote voter wagon wall wallet watch water watermelon way well wheel widget window wing winner wolf
    woman women word worker worm yarn zebra
    """
)  # fmt: skip
"""Things that word problems count; they say nothing about the number before them."""

DESCRIBING = names(
    """
    a an the of each red blue green yellow white black pink purple orange brown golden silver large small big
    tall distinct different possible whole total full empty new old long wide deep high young boy girl baby toy
    chess tennis soccer golf rubber real
    """
)  # fmt: skip
"""May stand between a number and its unit, never at the end."""

MULTIPLIERS = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}

CURRENCIES = {"$": "dollars", "\u20ac": "euros", "\u00a3": "pounds", "\u00a5": "yen", "\u20b9": "rupees"}

SYMBOLS = names(
    """
    alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta kappa lambda mu nu xi rho sigma tau phi
    varphi chi psi omega Gamma Delta Theta Lambda Xi Sigma Phi Psi Omega pi infty ell
    """
)

PLAIN_SYMBOLS = {name: f"\\{name}" for name in SYMBOLS if len(name) > 2 and name not in ("ell", "infty")} | {
    "pi": "\\pi", "inf": "\\infty", "oo": "\\infty", "infinity": "\\infty", "Infinity": "\\infty",
}  # fmt: skip

FUNCTIONS = table("""
    sin:
    cos:
    tan:
    cot:
    sec:
    csc:
    asin: arcsin
    acos: arccos
    atan: arctan
    sinh:
    cosh:
    tanh:
    ln:
    log:
    lg: log10
    log2:
    exp:
    sqrt:
    cbrt:
    abs: Abs
    floor:
    ceil: ceiling
    factorial:
    binomial: binom comb
    fraction: Fraction
""")
"""Functions by the names that LaTeX, Python and sympy give them."""

INVERSE = {"sin": "asin", "cos": "acos", "tan": "atan"}  # \sin^{-1} x

CHARACTERS = str.maketrans(
    {
        "\u2212": "-", "\u2013": "-", "\u2010": "-", "\u2011": "-", "\ufe63": "-", "\uff0d": "-", "\u2014": "-",
        "\u00d7": "*", "\u22c5": "*", "\u00b7": "*", "\u2217": "*", "\u00f7": "/", "\u2044": "/", "\u2215": "/",
        "\u00a0": " ", "\u2009": " ", "\u202f": " ", "\u2028": " ", "\u2029": " ", "\t": " ", "\n": " ", "\r": " ",
        "\uff0c": ",", "\uff08": "(", "\uff09": ")", "\u221e": "\\infty ", "\u03c0": "\\pi ", "\u03b8": "\\theta ",
        "\u03b1": "\\alpha ", "\u03b2": "\\beta ", "\u03bb": "\\lambda ", "\u03c6": "\\varphi ", "\u03c9": "\\omega ",
        "\u2264": "\\le ", "\u2265": "\\ge ", "\u2260": "\\ne ", "\u222a": "\\cup ", "\u2248": "\\approx ",
        "\u2229": "\\cap ", "\u2208": "\\in ", "\u00b1": "\\pm ", "\u00b0": "\\degree ", "\u211d": "\\mathbb{R}",
        "\u00b2": "^2", "\u00b3": "^3", "\u00bd": "\\frac{1}{2}", "\u00bc": "\\frac{1}{4}", "\u00be": "\\frac{3}{4}",
        "\u2205": "\\emptyset ", "\u27e8": "\\langle ", "\u27e9": "\\rangle ", "\u200b": "", "\ufeff": "",
    }
)  # fmt: skip

SAME_COMMANDS = {
    "dfrac": "\\frac", "tfrac": "\\frac", "cfrac": "\\frac", "leq": "\\le", "leqslant": "\\le", "geq": "\\ge",
    "geqslant": "\\ge", "neq": "\\ne", "lt": "<", "gt": ">", "varnothing": "\\emptyset", "lbrace": "\\{",
    "rbrace": "\\}", "lbrack": "[", "rbrack": "]", "dbinom": "\\binom", "tbinom": "\\binom", "lvert": "|",
    "rvert": "|", "vert": "|", "ldots": "\\ldots", "dots": "\\ldots", "cdots": "\\ldots", "simeq": "\\approx",
}  # fmt: skip
