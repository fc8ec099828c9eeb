"""The vocabulary of generated catalogues: invented kinds of wares, attributes, options, prices."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Ware:
    """A kind of product.

    Attributes:
        path: its place among the shop's categories, outermost first.
        attributes: what single products of the kind may have; no two of them match each other
            fuzzily.
        options: names of what can be chosen, each with a pool of values in OPTION_VALUES.
        prices: lowest and highest, in dollars.
    """

    noun: str
    category: str
    path: tuple[str, ...]
    attributes: tuple[str, ...]
    options: tuple[str, ...]
    prices: tuple[int, int]


OPTION_VALUES: dict[str, tuple[str, ...]] = {
    "color": (
        "black",
        "white",
        "red",
        "forest green",
        "navy",
        "grey",
        "pink",
        "burgundy",
        "beige",
        "yellow",
        "purple",
        "teal",
    ),
    "size": ("small", "medium", "large", "x-large", "xx-large"),
    "shoe size": ("6", "7", "8", "9", "10", "11", "12"),
    "flavor": (
        "vanilla",
        "chocolate",
        "lemon",
        "cinnamon",
        "sea salt",
        "honey",
        "mint",
        "hazelnut",
    ),
    "pack": ("pack of 1", "pack of 2", "pack of 4", "pack of 6", "pack of 12"),
    "scent": ("lavender", "rose", "unscented", "coconut", "citrus", "eucalyptus", "cedar"),
    "volume": ("2 fl oz", "4 fl oz", "8 fl oz", "16 fl oz"),
    "capacity": ("16 gb", "32 gb", "64 gb", "128 gb", "256 gb"),
    "length": ("3 feet", "6 feet", "10 feet", "15 feet"),
    "dimensions": ("18 inch", "24 inch", "30 inch", "36 inch", "48 inch"),
    "material": ("oak", "pine", "bamboo", "steel", "marble", "glass"),
}

_CLOTHES = ("Clothing, Shoes & Jewelry",)
_CARE = ("Beauty & Personal Care",)
_TECH = ("Electronics",)
_FOOD = ("Grocery & Gourmet Food",)
_HOME = ("Home & Kitchen",)

WARES: tuple[Ware, ...] = (
    Ware(
        "running shoes",
        "fashion",
        (*_CLOTHES, "Shoes", "Athletic"),
        (
            "rubber sole",
            "breathable mesh",
            "memory foam",
            "arch support",
            "non slip",
            "reflective trim",
        ),
        ("color", "shoe size"),
        (28, 95),
    ),
    Ware(
        "rain jacket",
        "fashion",
        (*_CLOTHES, "Outerwear", "Jackets"),
        (
            "water resistant",
            "hooded",
            "machine washable",
            "zipper closure",
            "packable",
            "fleece lined",
        ),
        ("color", "size"),
        (25, 110),
    ),
    Ware(
        "pajama set",
        "fashion",
        (*_CLOTHES, "Sleepwear", "Sets"),
        (
            "long sleeve",
            "elastic waist",
            "soft cotton",
            "tumble dry",
            "button front",
            "side pockets",
        ),
        ("color", "size"),
        (15, 55),
    ),
    Ware(
        "hiking backpack",
        "fashion",
        (*_CLOTHES, "Luggage", "Backpacks"),
        (
            "padded straps",
            "laptop sleeve",
            "chest buckle",
            "rain cover",
            "compression belt",
            "bottle holder",
        ),
        ("color", "volume"),
        (30, 120),
    ),
    Ware(
        "wool sweater",
        "fashion",
        (*_CLOTHES, "Knitwear", "Sweaters"),
        ("crew neck", "cable knit", "hand wash", "ribbed cuffs", "relaxed fit", "merino yarn"),
        ("color", "size"),
        (22, 85),
    ),
    Ware(
        "body lotion",
        "beauty",
        (*_CARE, "Skin Care", "Body"),
        (
            "paraben free",
            "shea butter",
            "dry skin",
            "vitamin e",
            "fast absorbing",
            "dermatologist tested",
        ),
        ("scent", "volume"),
        (6, 32),
    ),
    Ware(
        "shampoo",
        "beauty",
        (*_CARE, "Hair Care", "Shampoo"),
        ("sulfate free", "argan oil", "damaged hair", "tea tree", "color safe", "keratin complex"),
        ("scent", "volume"),
        (7, 36),
    ),
    Ware(
        "makeup brush set",
        "beauty",
        (*_CARE, "Tools & Accessories", "Brushes"),
        (
            "cruelty free",
            "synthetic bristles",
            "travel case",
            "wooden handles",
            "easy cleaning",
            "eye shadow",
        ),
        ("color", "pack"),
        (9, 45),
    ),
    Ware(
        "beard oil",
        "beauty",
        (*_CARE, "Shave & Hair Removal", "Beards"),
        ("alcohol free", "jojoba oil", "coarse hair", "pump bottle", "non greasy", "gift box"),
        ("scent", "volume"),
        (8, 30),
    ),
    Ware(
        "face mask",
        "beauty",
        (*_CARE, "Skin Care", "Face"),
        (
            "green tea",
            "sensitive skin",
            "hyaluronic acid",
            "fine lines",
            "clay formula",
            "plant based",
        ),
        ("scent", "pack"),
        (5, 28),
    ),
    Ware(
        "usb cable",
        "electronics",
        (*_TECH, "Accessories", "Cables"),
        (
            "fast charging",
            "braided nylon",
            "gold plated",
            "right angle",
            "data sync",
            "strain relief",
        ),
        ("color", "length"),
        (5, 25),
    ),
    Ware(
        "wireless headphones",
        "electronics",
        (*_TECH, "Audio", "Headphones"),
        (
            "noise cancelling",
            "foldable design",
            "built in microphone",
            "deep bass",
            "quick pairing",
            "over ear",
        ),
        ("color",),
        (24, 180),
    ),
    Ware(
        "memory card",
        "electronics",
        (*_TECH, "Storage", "Cards"),
        (
            "high speed",
            "shock proof",
            "ultra hd",
            "adapter included",
            "temperature resistant",
            "drone ready",
        ),
        ("capacity",),
        (8, 60),
    ),
    Ware(
        "tablet stand",
        "electronics",
        (*_TECH, "Accessories", "Stands"),
        (
            "aluminum alloy",
            "height adjustable",
            "anti scratch",
            "swivel base",
            "cable slot",
            "heavy duty",
        ),
        ("color", "dimensions"),
        (12, 48),
    ),
    Ware(
        "bluetooth speaker",
        "electronics",
        (*_TECH, "Audio", "Speakers"),
        (
            "stereo sound",
            "water proof",
            "long battery",
            "carry strap",
            "party lights",
            "voice assistant",
        ),
        ("color",),
        (18, 150),
    ),
    Ware(
        "granola bars",
        "grocery",
        (*_FOOD, "Snacks", "Bars"),
        (
            "gluten free",
            "high protein",
            "low sugar",
            "non gmo",
            "whole oats",
            "individually wrapped",
        ),
        ("flavor", "pack"),
        (6, 40),
    ),
    Ware(
        "ground coffee",
        "grocery",
        (*_FOOD, "Beverages", "Coffee"),
        ("dark roast", "fair trade", "single origin", "low acid", "shade grown", "stone milled"),
        ("flavor", "pack"),
        (9, 44),
    ),
    Ware(
        "herbal tea",
        "grocery",
        (*_FOOD, "Beverages", "Tea"),
        (
            "caffeine free",
            "usda organic",
            "loose leaf",
            "artificial colors free",
            "bedtime blend",
            "resealable tin",
        ),
        ("flavor", "pack"),
        (5, 30),
    ),
    Ware(
        "trail mix",
        "grocery",
        (*_FOOD, "Snacks", "Nuts"),
        (
            "dairy free",
            "roasted almonds",
            "dried cranberries",
            "kosher certified",
            "dietary fiber",
            "lightly salted",
        ),
        ("flavor", "pack"),
        (8, 38),
    ),
    Ware(
        "cookie gift box",
        "grocery",
        (*_FOOD, "Bakery", "Cookies"),
        (
            "hand decorated",
            "nut free",
            "real butter",
            "ready to eat",
            "birthday present",
            "small batch",
        ),
        ("flavor", "pack"),
        (12, 60),
    ),
    Ware(
        "throw pillow",
        "garden",
        (*_HOME, "Bedding", "Pillows"),
        (
            "removable cover",
            "velvet fabric",
            "hidden zipper",
            "double sided",
            "fade resistant",
            "living room",
        ),
        ("color", "dimensions"),
        (9, 42),
    ),
    Ware(
        "coffee table",
        "garden",
        (*_HOME, "Furniture", "Tables"),
        (
            "easy assemble",
            "storage shelf",
            "solid wood",
            "round corners",
            "metal legs",
            "mid century",
        ),
        ("material", "dimensions"),
        (60, 340),
    ),
    Ware(
        "desk lamp",
        "garden",
        (*_HOME, "Lighting", "Lamps"),
        (
            "dimmable light",
            "eye protection",
            "flexible neck",
            "touch control",
            "night mode",
            "clamp base",
        ),
        ("color",),
        (14, 75),
    ),
    Ware(
        "plant pot",
        "garden",
        (*_HOME, "Garden", "Planters"),
        (
            "drainage hole",
            "matching saucer",
            "frost resistant",
            "self watering",
            "matte finish",
            "lightweight resin",
        ),
        ("color", "dimensions"),
        (8, 50),
    ),
    Ware(
        "shower curtain",
        "garden",
        (*_HOME, "Bath", "Curtains"),
        (
            "mildew resistant",
            "weighted hem",
            "rustproof hooks",
            "quick drying",
            "floral print",
            "heavy polyester",
        ),
        ("color", "dimensions"),
        (10, 46),
    ),
)

MAKERS = (
    "Norvane Tallwick Brindlemoor Ostera Quillby Fernhollow Marlowe Kestrelane Havenrook Juniperia "
    "Lindqvale Ottersby Pemberlo "
    "Rookfield Sablewood Thistledown Umberly Vantorre Wexholm Yarrowby"
)
REVIEW_TITLES = {
    5: "Could not be happier",
    4: "Good value",
    3: "It is fine",
    2: "Expected more",
    1: "Went back the same day",
}
REVIEW_BODIES = {
    5: (
        "I bought this {noun} for my sister and ordered a second one for myself. The {attribute} "
        "part is exactly as described."
    ),
    4: (
        "Arrived on time and does its job. I like the {attribute} side of it; the packaging could "
        "be better."
    ),
    3: "An ordinary {noun}. Neither better nor worse than the one I had before.",
    2: "The {noun} looks nicer in the pictures. It took two weeks to arrive.",
    1: "Mine was damaged, and nobody answered my questions about this {noun}.",
}
