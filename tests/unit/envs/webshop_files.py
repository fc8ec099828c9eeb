"""A catalogue shaped like the published files: five products, two of them nearly the same."""

from __future__ import annotations

import json
from pathlib import Path

SHOES = "B07AAAAAA1"
TRAIL = "B07AAAAAA2"
JACKET = "B07BBBBBB1"
LOTION = "B07CCCCCC1"
CABLE = "B07DDDDDD1"


def build_entry(asin, name, **fields):
    """One product with every key that the published file has."""
    return {
        "name": name,
        "product_information": {},
        "brand": "Visit the Store",
        "brand_url": "https://shop.example/store",
        "full_description": f"About the {name}.",
        "pricing": "$20.00",
        "list_price": "",
        "availability_quantity": None,
        "availability_status": "In Stock.",
        "images": ["https://shop.example/image.jpg"],
        "product_category": "Clothing, Shoes & Jewelry \u203a Shoes \u203a Running",
        "average_rating": 4.5,
        "small_description": ["Made with care", "Ships in two days"],
        "total_reviews": 3,
        "total_answered_questions": "",
        "model": "",
        "customization_options": {},
        "seller_id": None,
        "seller_name": None,
        "fulfilled_by_amazon": None,
        "fast_track_message": "",
        "aplus_present": "",
        "small_description_old": "",
        "category": "fashion",
        "query": "running shoes",
        "page": 1,
        "asin": asin,
        **fields,
    }


def build_choices(*values):
    return [
        {
            "is_selected": False,
            "is_available": True,
            "value": value,
            "asin": "",
            "price": 0,
            "image": None,
        }
        for value in values
    ]


def list_entries():
    colours, sizes = build_choices("Navy Blue", " Red "), build_choices("8", "9/10")
    return [
        build_entry(
            SHOES,
            "Swift Running Shoes with Mesh",
            pricing="$42.50",
            customization_options={"Color": colours, "Size": sizes},
        ),
        build_entry(
            TRAIL,
            "Swift Trail Running Shoes",
            pricing="$1,049.00$1,105.49",
            customization_options={"Color": None},
        ),
        build_entry(
            JACKET,
            "Storm Rain Jacket",
            pricing="$12.99$15.49",
            query=" Rain Jacket ",
            product_category="Clothing, Shoes & Jewelry \u203a Coats",
            customization_options={"Size": build_choices("large", "Description")},
        ),
        build_entry(
            LOTION,
            "Calm Body Lotion",
            pricing="",
            category="beauty",
            query="body lotion",
            product_category="Beauty \u203a Skin",
            small_description="One text, not a list",
            customization_options=None,
        ),
        build_entry(
            CABLE,
            "Volt Cable",
            pricing=None,
            category="electronics",
            query="usb cable",
            product_category="Electronics \u203a Cables",
            full_description=None,
            small_description=None,
        ),
        build_entry(SHOES, "The same id again"),
        build_entry("nan", "No id"),
        build_entry("B07AAAAAA1X", "An id of eleven characters"),
    ]


ATTRIBUTES = {
    SHOES: {
        "attributes": ["breathable mesh", "rubber sole"],
        "instruction": "find me shoes",
        "instruction_attributes": ["mesh"],
    },
    TRAIL: {"attributes": ["rubber sole"]},
    JACKET: {
        "attributes": ["hooded"],
        "instruction": "Find me a jacket.",
        "instruction_attributes": ["hooded"],
    },
    LOTION: {"attributes": ["shea butter"], "instruction": None, "instruction_attributes": None},
}
HUMAN = {
    SHOES: [
        {
            "instruction": "i need breathable running shoes in navy blue, size 8.",
            "instruction_attributes": ["breathable mesh"],
            "instruction_options": ["navy blue", "8"],
            "options": ["color: navy blue", "size: 8"],
        },
        {"instruction": "i want anything", "instruction_attributes": [], "instruction_options": []},
    ],
    TRAIL: [
        {
            "instruction": "i want trail shoes",
            "instruction_attributes": ["rubber sole"],
            "instruction_options": [],
        },
    ],
    JACKET: [
        {
            "instruction": "a rain jacket for me",
            "instruction_attributes": ["hooded"],
            "instruction_options": {"size": "large"},
        },
    ],
    LOTION: [
        {
            "instruction": "some lotion",
            "instruction_attributes": ["shea butter"],
            "instruction_options": [],
        },
    ],
}
REVIEWS = [
    {
        "asin": SHOES,
        "average_rating": 4.5,
        "reviews": [{"title": "Nice", "stars": 5, "review": "They fit."}],
    },
    {"asin": TRAIL, "average_rating": 2.0, "reviews": [{"title": "Hm", "score": 2}]},
]


def write_files(
    directory: Path, entries=None, attributes=ATTRIBUTES, human=HUMAN, reviews=None, suffix=""
) -> Path:
    """Write the files; None leaves `human` or `reviews` out."""
    directory.mkdir(parents=True, exist_ok=True)
    contents = {
        f"items_shuffle{suffix}.json": list_entries() if entries is None else entries,
        f"items_ins_v2{suffix}.json": attributes,
        "items_human_ins.json": human,
        "reviews.json": reviews,
    }
    for name, content in contents.items():
        if content is not None:
            (directory / name).write_text(json.dumps(content, indent=1), encoding="utf-8")
    return directory
