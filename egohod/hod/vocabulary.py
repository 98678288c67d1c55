"""The words by which narrations are compared: groups that narrators use for one another, and words that say little.

Written for household and laboratory work. A word may be in several groups; a line of one word makes it known.
"""

from __future__ import annotations


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _index(table: str) -> dict[str, frozenset[int]]:
    """The groups of each word; a line of the table is one."""
    index: dict[str, set[int]] = {}
    for number, line in enumerate(table.strip().splitlines()):
        for word in line.split():
            index.setdefault(word, set()).add(number)
    return {word: frozenset(groups) for word, groups in index.items()}


VERBS = _index(
    """
    take grab get pick grasp grip fetch collect gather retrieve bring hold pinch lift raise carry use clutch keep
    take catch receive
    take remove withdraw clear
    hold support press secure steady keep have grip fix stabilize hang
    hold contain fill have carry
    hold press push
    press push squeeze compress flatten
    put place add pour set lay drop transfer return leave position move insert store
    put add sprinkle scatter season dump toss drip
    sprinkle drizzle drip scatter shake spread
    put place attach mount fit install insert fix assemble connect set cover cap join plug
    put pass give hand bring transfer
    pour drain empty dump tip spill transfer drip inject
    pour fill
    transfer move carry shift bring scoop inject slide
    move shift slide push pull drag lift lower carry turn pass transfer handle swing use touch wipe work
    work use touch operate move
    scoop ladle skim dig fish
    scoop take lift pick
    scoop transfer shovel
    stir mix beat whisk blend combine scramble toss swirl spread shake loosen
    stirfry fry saute sear cook stir toss flip turn brown mix
    cook boil simmer blanch heat steam bake roast burn warm fry stew
    turn flip rotate spin twist roll toss swirl revolve circle
    turn stir
    open uncover unscrew unlock untwist unwrap uncap loosen
    close shut cover screw seal cap fasten tighten lock
    cover wrap put
    cut slice chop dice mince carve trim shred julienne cube halve split divide slash section
    cut crush smash chop pound mash
    crush smash grind pound mash squash squeeze
    break crack split tear snap separate crush
    cut break split divide separate
    tap pat knock hit strike beat touch shake flick
    chop tap pat
    peel skin shave strip scrape
    peel remove cut
    scrape scratch rub shave push
    scrape clear clean wipe brush
    push scrape move shove slide
    wash rinse clean scrub flush
    clean wipe mop brush sweep dust polish rub
    wipe rub erase dry
    marinate pickle season soak rub cure
    shake sway swing vibrate wave
    shake jolt toss flip
    knead massage rub roll press
    roll wrap fold curl
    fold stack
    stack pile heap arrange align organize straighten sort tidy lay
    spread smear apply coat brush flatten lay
    draw extract suck aspirate absorb inhale pull
    inject add squeeze
    transfer aspirate
    pull draw drag tug
    pull remove detach separate unplug take disconnect
    attach connect join plug fasten stick tie
    adjust regulate change tune lower reduce increase turn
    taste eat drink sip consume lick
    look check inspect see view examine observe show display watch demonstrate
    read look
    measure weigh
    taste try
    throw discard dispose toss dump
    flick flip toss push
    tilt lean tip incline
    dip soak immerse submerge
    sieve strain filter drain
    scrub rub
    weigh balance
    release drop leave
    start begin
    pass hand give
    ignite light
    switch turn press
    point show
    wrap pack cover
    walk go come
    write mark note
    twist screw tighten turn wring
    screw attach
    dry drain
    ensure make
    stand lean
    add pour drizzle sprinkle
    throw dump
    scoop remove fish
    remove lift open uncover
    scoop pour transfer
    put crack break
    pat flatten press smooth
    sterilize sanitize disinfect clean
    thicken stew
    caramelize brown
    soak rehydrate marinate absorb wet
    coat cover marinate spread stir
    season marinate add
    mix season
    plate serve remove dish
    extract suction draw take withdraw suck
    transfer stir flip push
    smash flatten press crush
    peel tear
    sear saute sauté
    flick remove
    balance steady hold
    shake stir rotate
    put push scrape
    mix knead
    sift sieve shake
    boil heat
    heat hot warm
    tear remove break scatter
    catch receive take
    smooth spread flatten
    replace change put
    fry sear cook recook refry
    dip rinse wash soak
    strain filter scoop remove
    lock screw tighten
    attach push insert
    turnoff turn close stop
    scoop push
    inject pipette
    turnon turn open light start ignite
    light start ignite heat
    tidy arrange clean organize
    fill add put
    form make shape create prepare mold
    process prepare make
    prepare cut
    boil blanch
    serve plate put
    """
)
APART = frozenset(
    frozenset((first, second))
    for line in """
    inject add squeeze move bring drain empty tip scoop
    aspirate transfer
    squeeze crush smash push flatten
    pull move lift lower turn push take draw separate
    scrape peel clear clean move put shove
    tap beat shake flick
    cut smash separate break
    move lower turn pass put
    drain pour filter sieve strain empty
    separate crack crush take remove tear break
    spread mix beat blend scramble cover stir
    shake beat blend mix sprinkle scatter spread
    scatter add season
    sprinkle put season spread
    season put add
    insert pour add move
    leave put place add
    smash press cut
    release drop leave
    change put lower
    open light start
    cover attach set put marinate
    """.strip().splitlines()
    for first, *others in (line.split(),)
    for second in others
)
"""A first word and others that share a group with it by way of a third, and yet are different deeds."""
THINGS = _index(
    """
    pan pot wok frypan saucepan skillet
    spatula shovel turner scoop
    spatula spoon ladle slot skimmer scoop colander
    spoon teaspoon tablespoon spoonful spoonfuls
    strainer colander sieve skimmer filter
    plate dish tray saucer
    bowl basin dish container vessel
    plate bowl
    cup mug glass tumbler
    beaker cup
    container box jar tin can carton
    jar bottle flask canister shaker
    bottle vial
    lid cap cover top plug stopper
    knife blade cleaver cutter
    board cuttingboard block
    counter countertop table tabletop surface worktop desk desktop bench
    fire heat flame stove burner stovetop hob induction cooker switch
    cloth towel rag napkin tissue dishcloth fabric blanket
    tap faucet sink
    bin trash garbage can dustbin bucket
    fridge refrigerator
    cupboard cabinet drawer
    pipette dropper straw burette
    dropper tube
    tube pipe hose
    filter filtration paper
    rod stick stirrer
    stirrer blender mixer
    needle syringe
    phone mobile cellphone smartphone
    notebook book paper page
    solution liquid water fluid reagent mixture
    water soup broth juice stock
    oil grease
    sauce paste dressing gravy soy
    doubanjiang douban sauce beanpaste
    seasoning spice condiment flavoring salt msg powder bouillon
    seasoning sauce
    msg monosodium glutamate
    powder flour
    sugar salt
    starch cornstarch flour
    scallion onion shallot chive leek
    garlic clove
    ginger shallot
    pepper chili chilli capsicum paprika
    peppercorn pepper
    mushroom fungus ear shiitake
    fungus agaric
    tofu bean beancurd
    bean soybean sprout
    daylily lily
    lettuce cabbage greens vegetable rapeseed choy celery spinach
    vegetable ingredient food
    coriander cilantro parsley herb
    potato tuber
    tomato fruit
    eggplant aubergine
    zucchini courgette
    cucumber melon
    egg yolk white omelette
    meat pork beef loin tenderloin chicken lamb mutton thigh fillet sirloin buttock
    noodle pasta spaghetti dough dumpling gnocchi
    dough dumpling wrapper ball
    lump ball dough
    rice grain
    skin peel
    root stem stalk tip head
    core seed
    leaf stalk stem
    rack holder stand
    bread bun
    tail tip stem end
    rod pushrod plunger
    flake paste powder slice
    container shaker box
    injector injection
    laboratory lab experimental
    shrimp prawn
    alkali alkaline soda lye edible
    culture growth medium
    shoot sprout seedling moss
    aromatic fragrance smell
    food dish ingredient vegetable
    can shaker box
    utensil spatula spoon shovel
    balance scale
    anise octagonal
    sesame oil
    paste powder mince
    peeler knife
    paddy rice
    garbage rubbish waste
    glove gloves
    vinegar wine
    aroma fragrance smell flavor taste
    machine device
    object thing item
    handle knob
    tap pipe faucet water
    broth sauce soup
    flour dough noodle batter
    pea bean cowpea edamame
    base stand
    enoki needle mushroom
    bottle pot
    wine sake
    vein line
    roll paper
    percent tenth
    rape rapeseed
    flavor sauce
    scum foam impurity
    fat oil
    incubator chamber cabinet
    beef steak ham bacon sausage
    carrot radish
    corn pea
    yam potato
    cheese butter milk cream yogurt
    apple orange banana lemon lime pear peach
    cake cookie biscuit
    phone tablet laptop computer
    pen pencil marker crayon
    hammer mallet
    screw nail bolt nut
    screwdriver drill wrench spanner plier
    scissors cutter
    wood plank timber board log
    brick stone rock
    soil sand dirt ground
    plant flower leaf
    string rope thread yarn cord wire
    shirt trouser dress cloth
    shoe boot sock
    hat cap helmet
    chair stool seat
    door gate window
    bag pouch sack packet
    bucket pail
    broom mop brush
    bicycle bike car tyre wheel
    card ball toy
    button switch
    chopstick
    kettle
    iron
    lamp
    brush
    whisk
    medicine
    porcelain
    packaging
    plastic
    oyster
    abalone
    clam
    crab
    fish
    honey
    peanut
    sesame
    anise
    metal steel
    """
)
SOFT = _words(
    """
    a about above across after again against air all allow along already also am amount an and another any apart
    appropriate are area arm arms around as aside at away back batch be become been before begin behind being below
    beside between big bit both bottom but by c can careful carefully center centre chef clean clear clearly cold
    come complete completely constantly continue continuously cook cool corner could dark demonstrate demonstration
    demonstrator diagonally did different directly display do does down drop dry during each easy edge eg eight
    enough ensure etc even evenly every everything excess explain explanation extra far few finally fine finely
    finger fingers finish firmly first five for form forward four fragrant fresh freshly from front full fully
    further gentle gently get go gradually gram had half hand handful hands has have he heavy help her here high him
    his horizontally hot i ie if in inside into is it its just keep kind large last late later left leftover let
    light lightly little long loosely lot low lower make many may me medium middle ml moderate more most much must
    my near neat neatly need needed new next nine no not now o of off on once one ones only onto or order other
    others our out outside over pair palm palms part parts pinch place point portion position present process
    properly quick quickly ready ready-made remain remaining repeat repeatedly rest right round same scoopful second
    separate set seven several she short should show showcase side sides similar simply six slightly slow slowly
    small so some spicy start state step still stop stroke such suitable sure surface ten tender than that the their
    them then there these they thick thin third this thorough thoroughly those three through thumb tightly till time
    times tiny to together too top toward towards transparent try twice two type under until up upper upright use
    used using various vertically very want warm was way we wearer well were wet what when where which while who
    whole will with within without would wrist x y you your
    """
)
"""Function words, degrees and amounts: never compared."""
SHAPES = _words(
    """
    able afterwards belly bit chunk clump consistency coordination cube delicious diagonal diamond dice early entire
    flat following gas half head heating leaf leave like lump lumpy middle mince minimum mixture moment multiple
    outward petri piece powder pre presentation rhombus section segment shape shred size slice slight sprout strip
    surface tenth texture top triangle triangular uniform wide width
    """
)
"""Narrators leave shapes and amounts out and put them in freely."""
KINDS = _words(
    """
    black bulb chef chinese chopping cooking cutting dark display edible fatty firm food frying green heat kitchen
    lean medicine pale peeling red season sichuan spring streaky suction vertical white wood wooden yellow
    """
)
"""Kinds and colours, as free before a thing; where nothing follows they are things: "into the wood"."""
TOOLS = _words(
    """
    basin board bowl chopstick counter cuttingboard dish handle knife ladle lid oil pan plate pot sauce spatula
    spoon starch table water
    """
)
"""What actions are done with or on: narrators add and drop it as understood."""
_STIRRING = _words(
    "stir stirfry fry saute sear mix beat whisk blend flip turn toss scoop dig fish skim add put place pour drain "
    "cook boil simmer blanch serve plate take pick spread press push scrape break separate season taste eat "
    "transfer sprinkle"
)
UNDERSTOOD = {
    "knife": _words(
        "cut slice chop mince dice peel carve trim shred julienne cube halve split divide section smash crush flatten "
        "pat scoop scrape"
    ),
    "spatula": _STIRRING,
    "ladle": _STIRRING,
    "spoon": _STIRRING,
    "chopstick": _STIRRING,
    "oil": _words("fry stirfry cook heat pour add"),
    "water": _words("wash rinse clean boil cook blanch soak drain pour add steam"),
    "sauce": _words("season add pour stir cook marinate"),
    "starch": _words("add pour thicken stir cook marinate"),
}
"""Of these, the deeds with which they go without saying; elsewhere whoever names them has made them up."""
GENERIC = _words(
    """
    aroma bag condiment container content food fragrance ingredient item liquid mixture object part piece portion
    reagent scent seasoning smell solution spice thing vegetable
    """
)
"""Words for many things: where nothing is missing, they name nothing new."""
MOTION = _words(
    """
    anticlockwise approach away backward begin circle circular clockwise closer come contact counterclockwise
    direction downward downwards end frame go hover idle leftward motion motionless move moves path picture quick
    reach release repeatedly rest return rightward scene sight slow start static stay steadily steady still stop
    touch touching travel unseen upward upwards view visible
    """
)
"""What a hand-object narration adds; the tracks answer for it, not the source."""
LIGHT = _words(
    """
    bring get grab have hold keep lift pick take use
    """
)
"""Verbs of any action: that they are dropped, or stand for one another, says nothing."""
PLAIN = _words(
    """
    allow assist avoid become begin cause come complete contain continue create demonstrate display enhance ensure
    explain finish give go help include let prevent provide
    make need place prepare present proceed process put rest season serve set show start stop try use want work
    """
)
"""Verbs of no action in particular: that they are put in says nothing."""
PLACING = _words(
    """
    place put
    """
)
"""Plain verbs that may be dropped, but stand for no other deed: "cracks it into the pot" is no putting."""
BEFORE_THINGS = _words(
    """
    a all an another any at both by each eight every few five for four from half her his in inside into its little
    more my nine no of on one onto our seven six some ten that the their these this those three two using with your
    """
)
"""What a thing may follow."""
AFTER_THINGS = _words(
    """
    and as at by for from held in inside into is of on onto or so that then to until using which while with
    """
)
"""What may follow a thing, and hardly what says how a thing is."""
ACTORS = _words(
    """
    c hand hands
    """
)
"""Who does: what follows is a verb."""
LICENCE = _words(
    """
    , . : ; and are c hand hands is it or that them then to which while
    """
)
"""What a verb may follow."""
DETERMINERS = _words(
    """
    a an her his it my some the them your
    """
)
"""What begins the thing that something is done to."""
BEING = _words(
    """
    are be been being is was were
    """
)
"""After these a participle says what is done."""
ODD_LEMMAS = {
    "mixe": "mix",
    "attache": "attach",
    "shook": "shake",
    "overcook": "cook",
    "dicing": "dice",
    "msg": "msg",
    "chilies": "chili",
    "chillies": "chili",
    "knives": "knife",
    "leaves": "leaf",
}
"""Where the lemmatiser errs."""
PHRASES = {
    r"stir[- ]?(fry|fries|fried|frying)": "stirfry",
    r"deep[- ](fry|fries|fried|frying)": "fry",
    r"(?:green|spring|chopped green)[- ]onions?": "scallion",
    r"wood[- ]ears?(?: mushrooms?| fungus)?|(?:black|white|tree|dried)? ?fung(?:us|i)|black (?:wood )?ears?": "fungus",
    r"black mushrooms?": "fungus",
    r"(?:green|red|bell|sweet|chili|chilli|hot)[- ](?:bell )?peppers?": "pepper",
    r"(?:cutting|chopping)[- ]?(?:boards?|blocks?)": "cuttingboard",
    r"(?:frying|kitchen|cooking|vegetable|fruit|fry|stir-frying|mixing|measuring)[- ](?=\w)": "",
    r"bok choy|choy sum|oilseed rape|rape ?seed(?: greens)?": "rapeseed",
    r"monosodium glutamate": "msg",
    r"chicken (?:essence|bouillon|powder|stock)": "bouillon",
    r"(?:soy)?bean[- ]?curd": "tofu",
    r"(?:spicy|chili|broad)? ?bean paste|pixian douban": "doubanjiang",
    r"corn[- ]?(?:starch|flour)": "starch",
    r"day[- ]?lil(?:y|ies)(?: buds?| flowers?)?|lily (?:buds?|flowers?)|yellow flowers?": "daylily",
    r"(?:for|to|and)? ?(?:be )?(?:used?|using|set(?:ting)? aside|put aside) (?:for )?later(?: use)?": "",
    r"for (?:later|future|further) use|for (?:back ?up|a while|a few (?:moments|times|seconds|minutes))": "",
    r"set(?:s|ting)? (?:it |them )?aside|in preparation": "",
    r"turn(?:s|ed|ing)? (?:it )?off|switch(?:es)? off|shut(?:s)? off": "turnoff",
    r"turn(?:s|ed|ing)? (?:it )?on|switch(?:es)? on": "turnon",
    r"side to side|back and forth|from (?:left|right) to (?:left|right)": "",
    r"make(?:s)? sure|as well as|such as|as if|one side|in (?:order|front)": "",
}  # fmt: skip
"""Several words that are one thing, or none; patterns over lower-case text."""
