"""Write the words that come with msae: `src/msae/concepts/words.txt`.

python scripts/make_words.py oewn_synsets.tsv frequency_dictionary_en_82_765.txt \\
    frequency_bigramdictionary_en_243_342.txt

The .tsv lists the synsets of Open English WordNet: synset, lexicographer file, members as `lemma#sense rank` with `|`
between them, and hypernyms. The other two, how often English words and pairs of words occur, are part of the package
symspellpy (MIT); they only decide which lemmas are common enough. The rules:

1. Nouns come from lexicographer files of things that can be seen (`QUOTAS`), with one of the first two senses of the
   noun there, or from the hyponyms of some synsets (`UNDER`), with the first sense, or one of three of a colour; at
   most two lemmas of a synset and at most three words of a phrase. No names of particular things, no drugs and
   poisons. A lemma with more senses as a verb or an adjective than as a noun is left out: *get* is no thing.
2. Of each place the commonest are taken. A phrase that is not among the pairs of words counts as a 400th of its rarest
   word.
3. People only by what they do or how they are related: many other words for them in WordNet hurt.
4. Adjectives, actions, styles and moods have no place of their own in WordNet: `BY_HAND` lists them. Those that are no
   lemma of WordNet are printed.
"""

from __future__ import annotations

import argparse
import csv
import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

OUT = Path(__file__).parents[1] / "src" / "msae" / "concepts" / "words.txt"
ATTRIBUTION = """\
# Words that can be seen in pictures, one a line; made by scripts/make_words.py.
# Nouns: from Open English WordNet (https://en-word.net), licence CC BY 4.0
# (https://creativecommons.org/licenses/by/4.0/), derived from Princeton WordNet; chosen, not changed.
# Adjectives, actions, styles and moods: chosen by the authors of msae.
"""

QUOTAS = {
    "noun.artifact": 3600, "noun.animal": 900, "noun.plant": 350, "noun.food": 700,
    "noun.object": 260, "noun.substance": 160, "noun.shape": 90, "noun.phenomenon": 50, "noun.event": 30,
}  # fmt: skip
"""How many nouns of a lexicographer file."""
UNDER = {
    "chromatic color": 150, "achromatic color": 40, "fabric": 140, "metallic element": 30, "alloy": 30, "gem": 40,
    "jewel": 15, "wood": 50, "rock": 40, "leather": 15, "paper": 30, "sport": 160, "dancing": 40, "game": 60,
    "worker": 170, "athlete": 50, "performer": 60, "musician": 50, "relative": 50, "serviceman": 30,
    "religionist": 10, "clergyman": 15, "ruler": 15, "scientist": 15, "artist": 20, "health professional": 25,
    "traveler": 30, "natural depression": 15, "body of water": 40, "geological formation": 60,
    "ceremony": 30, "celebration": 25, "meal": 20, "dish": 130, "garment": 160, "footwear": 40, "vehicle": 160,
    "furniture": 70, "musical instrument": 90, "building": 110, "room": 70, "tool": 90, "toy": 40, "weather": 30,
    "cooking utensil": 30, "dog": 110, "bird": 130, "cat": 20, "fish": 60, "insect": 60, "flower": 90,
    "edible fruit": 60, "vegetable": 50, "cosmetic": 30, "jewelry": 25, "headdress": 50, "graphic art": 20,
    "painting": 15, "writing": 25, "sign": 20, "container": 120, "electronic equipment": 40, "lamp": 25,
}  # fmt: skip
"""How many hyponyms, at any depth, of the synset whose first member is that word; beyond those taken already."""
NOT_UNDER = {"drug", "medicine", "poison", "chemical compound", "bacterium", "virus", "weapon of mass destruction"}
SENSES = 2
"""Senses of a noun that count in a lexicographer file: a *donkey* is a party's sign first."""
COLOUR_SENSES = 3
"""The same of a colour word; *orange* is a fruit and a tree before."""
LEFT_OUT = {"piss", "crap", "shit", "cock", "pussy", "dyke", "gypsy", "hobo", "stripper", "slave", "cuckold"}
"""Words that nobody wants to read on a page."""

BY_HAND = {
    "things": """animal person man woman boy girl child baby toddler teenager adult couple family group bride groom
        people men women children team pedestrian tourist bear book train watch dress brush fan bat fly duck seal
        turkey bass crane lock match ring iron stamp file bolt bow nail saw drill plane spring top block ball wave club
        letter card note sign flag light shadow smoke fire dust hand foot face eye hair back head bark leaf saddle fork
        cover bowl mask mouse kite sandwich butterfly leopard dog cat bird fish pet cattle sheep plant tree flower grass
        sky cloud sea sun moon star water ice snow rain sand house home street road bridge river lake mountain forest
        T-shirt tee sneakers trainers flip-flops jeans trousers shorts leggings sari saree kurta hijab sunglasses
        earrings perfume lipstick nail-polish airplane motorbike cellphone smartphone laptop tablet television couch
        doughnut donut ice-cream hot-dog french-fries fire-hydrant traffic-light stop-sign wine-glass tennis-racket
        baseball-glove baseball-field parking-meter potted-plant hair-dryer remote-control""",
    "body": """hand foot arm leg face eye eyes nose mouth lips tongue teeth ear cheek chin forehead neck shoulder elbow
        wrist fist palm finger thumb fingernail knee ankle toe heel back chest belly navel hip waist skin muscle hair
        eyebrow eyelash beard moustache braid ponytail curls bangs dreadlocks mohawk freckle scar tattoo wrinkle skull
        skeleton bone heart brain blood paw hoof claw horn antler tusk snout beak wing feather tail fin mane fur shell
        tentacle""",
    "colours": """white black grey gray red green blue yellow orange purple pink brown beige cream navy teal turquoise
        cyan magenta maroon burgundy crimson scarlet violet lavender lilac indigo golden silvery bronze copper khaki
        olive tan ivory charcoal peach coral mint mustard rust multicolored colorful pastel neon monochrome
        black-and-white sepia pale dark bright light vivid dull transparent translucent opaque metallic pearly
        iridescent fluorescent tinted bicolor blond blonde auburn dark-haired tanned colorless rainbow-colored
        two-tone off-white sky-blue dark-blue light-blue dark-green light-green dark-red""",
    "materials": """wooden metal metallic steel iron brass copper gold silver bronze aluminum plastic rubber leather
        suede denim cotton woolen silk satin velvet linen lace knitted crocheted woven felt fleece nylon polyester
        canvas paper cardboard glass ceramic porcelain clay stone marble granite concrete brick bamboo wicker straw
        fur feathered glassy earthen mesh chiffon tweed corduroy tulle waxed wax icy foam stainless""",
    "patterns": """striped spotted dotted checked checkered plaid tartan floral paisley camouflage printed patterned
        plain solid embroidered quilted pleated ruffled fringed beaded sequined studded tie-dyed marbled mottled
        speckled zigzag herringbone houndstooth geometric abstract tiled mosaic swirling wavy polka-dot lined gridded
        brindled dappled banded veined honeycombed graphic animal-print leopard-print zebra-striped lettered numbered
        monogrammed logo text handwriting lettering caption watermark signature barcode letters numbers""",
    "textures": """smooth rough shiny glossy matte fuzzy furry hairy fluffy woolly bumpy grainy cracked wrinkled
        crumpled folded creased ribbed scaly prickly spiky thorny slimy sticky wet dry damp dusty muddy dirty clean
        rusty weathered worn torn ragged frayed polished frosted foamy bubbly crispy crunchy creamy crumbly flaky
        moldy mossy leafy grassy sandy rocky stony pebbly snowy frozen melted porous bristly silky velvety leathery
        waxy oily greasy peeling chipped dented scratched stained padded perforated corrugated braided tangled
        knotted twisted coiled crystalline powdery spongy feathery""",
    "shapes": """round circular oval square rectangular triangular spherical cubic cylindrical conical hexagonal
        star-shaped heart-shaped ring-shaped crescent pointed sharp blunt curved bent straight crooked flat hollow
        thick thin wide narrow long short tall slender bulky tiny small large big huge giant oblong spiral
        symmetrical asymmetrical tapered angular arched domed ribbon-like tubular bulbous lumpy jagged serrated
        pleated forked branching layered stacked rolled sleeveless long-sleeved short-sleeved hooded collared
        high-heeled backless strapless low-cut v-neck buttoned zipped laced open-toed slim loose tight oversized
        cropped knee-length ankle-length high-waisted full-length bald bearded""",
    "states": """old new young antique modern broken intact open closed empty full crowded deserted abandoned ruined
        burning burnt smoking steaming boiling flooded overgrown blooming wilted ripe unripe rotten raw cooked fried
        grilled baked roasted sliced chopped peeled grated whole half-eaten frosted glazed stuffed wrapped packed
        tied hanging floating flying standing sitting lying leaning falling rising moving parked stationary blurred
        blurry sharp grainy overexposed underexposed backlit cropped tilted upside-down reflected mirrored distorted
        enlarged close-up close aerial distant foreground background indoor outdoor underwater nocturnal sunny cloudy
        overcast foggy misty hazy rainy stormy windy sunlit moonlit starry candlelit floodlit shadowy dim illuminated
        glowing sparkling glittering glaring lit naked barefoot masked veiled uniformed costumed armed wounded
        pregnant elderly disabled asleep awake crouching kneeling pointing lonely paired twin single multiple many few
        several clustered scattered lined-up symmetrical handmade homemade domestic wild tame newborn adult juvenile
        striped-tail horned winged tailed clawed tusked hoofed four-legged two-wheeled three-wheeled electric
        electronic mechanical automatic manual portable disposable inflatable wireless toy miniature life-size""",
    "scenes": """landscape seascape cityscape skyline portrait still-life panorama sunset sunrise dusk dawn night day
        twilight noon winter summer spring autumn countryside suburb downtown village harbor coast shore beach
        desert jungle rainforest savanna tundra meadow prairie wetland riverside lakeside seaside mountainside
        hillside roadside backyard courtyard playground parking-lot construction-site crime-scene street-market
        shopping-mall supermarket food-court classroom lecture-hall office-desk waiting-room operating-room
        living-room dining-room kitchen bedroom bathroom basement attic staircase hallway rooftop stage backstage
        stadium arena gym museum gallery church temple mosque cemetery hospital airport train-station subway
        interior exterior indoors outdoors crowd audience queue traffic rush-hour picnic barbecue party wedding
        birthday funeral parade concert festival carnival protest race match ceremony meeting interview
        product-photo white-background selfie group-photo screenshot document map diagram chart poster advertisement
        banner logo menu receipt book-cover album-cover magazine-cover newspaper webpage""",
    "actions": """running walking jumping climbing swimming diving surfing sailing rowing kayaking fishing skiing
        snowboarding skating skateboarding cycling riding driving flying parachuting dancing singing playing cheering
        clapping laughing smiling crying shouting talking whispering kissing hugging shaking-hands waving pointing
        pushing pulling lifting carrying throwing catching kicking hitting punching fighting wrestling boxing fencing
        shooting hunting digging planting watering harvesting cutting chopping sawing hammering drilling painting
        drawing writing reading typing studying teaching cooking baking frying grilling stirring pouring drinking
        eating biting chewing licking smoking feeding grazing washing cleaning sweeping mopping ironing sewing
        knitting weaving shaving brushing combing bathing showering sleeping resting yawning stretching exercising
        meditating praying marching crawling kneeling bowing balancing juggling spinning rolling sliding swinging
        hanging falling floating splashing blowing exploding burning melting growing blooming hatching nesting
        perching hovering barking howling roaring wagging begging hiding chasing working building repairing welding
        shopping selling paying posing photographing filming gardening camping hiking bowling golfing batting pitching
        dribbling serving bouncing juggling bench-pressing push-ups pull-ups sit-ups tai-chi yoga archery karate judo
        applying-makeup applying-lipstick blow-drying""",
    "styles": """realistic photorealistic abstract cubist surreal impressionist expressionist minimalist baroque gothic
        medieval renaissance romantic classical neoclassical rococo art-deco art-nouveau pop-art pixel-art
        line-drawing sketch watercolor oil-painting pastel-drawing ink-drawing pencil-drawing charcoal-drawing
        engraving etching woodcut lithograph mosaic fresco mural graffiti calligraphy collage cartoon comic anime
        manga caricature illustration clip-art infographic rendering hologram x-ray infrared thermal microscopic
        satellite-image vintage retro rustic industrial futuristic psychedelic tribal ethnic traditional
        victorian punk hippie bohemian preppy formal casual sporty elegant fancy luxurious cheap kitsch cute grunge
        military nautical western tropical religious heraldic ornate decorative carved sculpted engraved gilded
        enameled lacquered painted varnished stained-glass stylized primitive prehistoric ancient egyptian greek
        roman byzantine islamic chinese japanese indian african european american mexican""",
    "moods": """happy sad angry scared surprised disgusted calm serene peaceful cozy joyful cheerful festive playful
        funny silly romantic passionate sensual dreamy mysterious eerie spooky scary creepy gloomy bleak dramatic
        epic tense violent gory chaotic lively energetic exciting lonely melancholic nostalgic solemn serious proud
        shy bored tired sleepy confused worried relaxed friendly hostile menacing majestic magical whimsical cold hot
        warm cool fresh refreshing appetizing delicious disgusting beautiful ugly""",
}


class Synset(NamedTuple):
    file: str
    members: list[tuple[str, int]]
    """Lemmas, and which of their senses this one is; 1 is the first."""
    hypernyms: list[str]


class Commonness:
    """How often a lemma occurs in English, as the logarithm of a count."""

    def __init__(self, synsets: dict[str, Synset], words: Path, pairs: Path) -> None:
        self.senses = Counter(lemma for synset in synsets.values() for lemma, _ in synset.members)
        self.nouns = Counter(
            lemma for synset in synsets.values() if synset.file.startswith("noun") for lemma, _ in synset.members
        )
        lines = [line.rsplit(" ", 1) for file in (words, pairs) for line in file.read_text("utf-8-sig").splitlines()]
        self.counts = {text: int(count) for text, count in lines}

    def __call__(self, lemma: str) -> float:
        words = re.split("[ -]", lemma.lower())
        if " ".join(words) in self.counts:
            # pairs were counted in less text than words: some 20 times
            return math.log(self.counts[" ".join(words)]) + (3 if len(words) > 1 else 0)
        return min(math.log(self.counts.get(word, 1000)) for word in words) - 6 * (len(words) - 1)

    def is_thing(self, lemma: str) -> bool:
        return 2 * self.nouns[lemma] >= self.senses[lemma]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("synsets", type=Path, help="the .tsv of synsets")
    parser.add_argument("words", type=Path, help="how often words occur: a word and a count a line")
    parser.add_argument("pairs", type=Path, help="the same of pairs of words")
    arguments = parser.parse_args()
    synsets = read(arguments.synsets)
    common = Commonness(synsets, arguments.words, arguments.pairs)
    sections = dict(by_hand(common))
    taken = {word for words in sections.values() for word in words}
    excluded = {synset for name in NOT_UNDER for synset in hyponyms(synsets, name)}
    for name, count in (QUOTAS | UNDER).items():
        found = hyponyms(synsets, name) if name in UNDER else {key for key, one in synsets.items() if one.file == name}
        senses = COLOUR_SENSES if name.endswith("color") else SENSES if name in QUOTAS else 1
        words = nouns([synsets[key] for key in sorted(found - excluded)], common, senses)
        sections[name] = sorted([word for word in words if word not in taken][:count])
        taken |= set(sections[name])
    lines = [f"# {name}\n" + "\n".join(words) + "\n" for name, words in sections.items() if words]
    OUT.write_text(ATTRIBUTION + "".join(lines), encoding="utf-8")
    print(f"{len(taken):,} words in {OUT}")


def read(file: Path) -> dict[str, Synset]:
    with file.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
    return {
        row["synset"]: Synset(
            row["lexfile"],
            [(lemma, int(rank)) for lemma, rank in (member.rsplit("#", 1) for member in row["members"].split("|"))],
            (row["hypernyms"] or "").split("|"),
        )
        for row in rows
    }


def by_hand(common: Commonness) -> Iterator[tuple[str, list[str]]]:
    seen: set[str] = set()
    for name, text in BY_HAND.items():
        # a phrase is written with hyphens here; it keeps them where WordNet writes it so
        words = [word if word in common.senses else word.replace("-", " ") for word in text.split()]
        yield name, [word for word in dict.fromkeys(words) if word not in seen]
        seen |= set(words)
        if unknown := [word for word in words if " " not in word and word not in common.senses]:
            print(f"not in WordNet, {name}: {', '.join(unknown)}")


def hyponyms(synsets: dict[str, Synset], name: str) -> set[str]:
    """The synset whose first sense as a noun is `name`, and all under it."""
    under: dict[str, list[str]] = {}
    for key, synset in synsets.items():
        for above in synset.hypernyms:
            under.setdefault(above, []).append(key)
    found = {key for key, one in synsets.items() if one.file.startswith("noun") and (name, 1) in one.members}
    if not found:
        raise SystemExit(f"no noun has the first sense {name!r}")
    new = list(found)
    while new:
        new = [key for parent in new for key in under.get(parent, ()) if key not in found]
        found |= set(new)
    return found


def nouns(synsets: list[Synset], common: Commonness, senses: int) -> list[str]:
    """The lemmas of some synsets by the rules above, the commonest first."""
    chosen: set[str] = set()
    for synset in synsets:
        lemmas = [lemma for lemma, rank in synset.members if rank <= senses]
        words = [lemma for lemma in lemmas if is_word(lemma) and common.is_thing(lemma)]
        chosen.update(sorted(words, key=lambda word: -common(word))[:2])
    return sorted(chosen, key=lambda word: (-common(word), word))


def is_word(lemma: str) -> bool:
    is_plain = re.fullmatch(r"([A-Z]-)?[a-z]+([ '-][a-z]+){0,2}", lemma) is not None and 2 < len(lemma) <= 24
    return is_plain and lemma not in LEFT_OUT


if __name__ == "__main__":
    main()
