"""First user messages for a target to answer: tasks crossed with topics, all written for this project.

No data set and none of the packaged sample prompts is used, so every benchmark stays unseen. The pairs are walked
in a seeded order without repetition (:func:`messages`), so that two rows share a prompt only once all have been used.
"""

import random
from collections.abc import Iterator

TOPICS = [
    topic.strip()
    for topic in """
    tides; volcanoes; honey bees; the water cycle; photosynthesis; vaccines; black holes; earthquakes; rainbows;
    antibiotics; magnets; lightning; glaciers; coral reefs; migrating birds; sleep; memory; muscles; the human heart;
    digestion; allergies; dehydration; the immune system; vitamins; fermentation; yeast; soap; batteries; solar panels;
    wind turbines; electric motors; steam engines; bridges; elevators; refrigerators; microwave ovens; bicycles;
    airplanes; submarines; satellites; telescopes; cameras; printers; radios; lasers; fibre optics; the internet;
    search engines; encryption; passwords; spam filters; databases; operating systems; compilers; neural networks;
    recommendation systems; robots; self-driving cars; drones; barcodes; blockchains; cloud storage; open source;
    the printing press; the Silk Road; the Roman roads; medieval guilds; castles; the Renaissance; the plague;
    the Industrial Revolution; railways; the telegraph; the space race; the Olympic Games; suffrage; the Cold War;
    trade unions; democracy; constitutions; juries; taxes; inflation; interest rates; stock markets; insurance;
    mortgages; budgets; supply and demand; monopolies; tariffs; unemployment; minimum wages; public transport;
    city parks; zoning; housing; recycling; composting; plastic waste; air pollution; noise; drinking water; droughts;
    floods; forest fires; deserts; rain forests; wolves; whales; octopuses; elephants; cats; dogs; horses; penguins;
    butterflies; mushrooms; oak trees; tomatoes; potatoes; rice; wheat; coffee; tea; chocolate; cheese; bread;
    olive oil; spices; salt; sugar; vegetarian cooking; soups; salads; pancakes; pasta; school lunches; picnics;
    restaurants; running; swimming; yoga; chess; football; basketball; tennis; hiking; camping; fishing; gardening;
    knitting;
    painting; photography; pottery; woodworking; origami; calligraphy; poetry; novels; short stories; fairy tales;
    science fiction; mystery novels; biographies; libraries; newspapers; podcasts; films; theatre; opera; jazz; choirs;
    pianos; guitars; drums; folk dances; museums; sculpture; architecture; fashion; shoes; jewellery; perfume; toys;
    board games; video games; puzzles; magic tricks; jokes; festivals; birthdays; weddings; funerals; holidays;
    train journeys; road trips; hostels; mountains; islands; beaches; lakes; rivers; caves; lighthouses; harbours;
    markets; villages; Lisbon; Kyoto; Nairobi; Buenos Aires; Iceland; Morocco; Vietnam; New Zealand; Canada; India;
    friendship; honesty; patience; courage; kindness; jealousy; loneliness; anger; grief; gratitude; luck; boredom;
    curiosity; ambition; forgiveness; leadership; teamwork; negotiation; job interviews; remote work; meetings;
    time management; procrastination; note taking; exams; homework; handwriting; learning a language; mathematics;
    geometry; fractions; percentages; probability; statistics; prime numbers; algebra; calculus; logic; paradoxes;
    ethics; free will; happiness; dreams; ageing; childhood; parenting; grandparents; neighbours; pets; moving house;
    small businesses; bakeries; bookshops; farms; hospitals; nurses; firefighters; teachers; pilots; engineers;
    lawyers; journalists; astronauts; inventors; detectives; kings; pirates; dragons; ghosts; time travel; aliens
    """.replace("\n", " ").split(";")
]
"""What to write about."""

TASKS = [
    line.strip()
    for line in """
    Explain {t} to a ten-year-old.
    Explain how {t} work or came about, step by step.
    What should everybody know about {t}?
    Write a short story about {t}.
    Write a short story about {t} that begins with a thunderstorm.
    Write a poem about {t}.
    Write a limerick about {t}.
    Write an e-mail to a colleague who wants to learn about {t}.
    Write a polite letter of complaint that has to do with {t}.
    Write a blog post about {t} with a title and three sections.
    Write an outline for a talk about {t}.
    Write a dialogue between two friends who disagree about {t}.
    Write a product description for a book about {t}.
    Write a newspaper headline and a first paragraph about {t}.
    Write a review of a documentary about {t}.
    Write a speech of one minute about {t}.
    Write five quiz questions about {t}, with answers.
    List ten facts about {t}.
    List the advantages and disadvantages of {t}.
    List seven questions an expert on {t} would ask.
    Give me three tips that have to do with {t}.
    Give a definition of {t} and two examples.
    Summarise what is known about {t} in three sentences.
    Describe {t} without using the letter z.
    Describe a day that is all about {t}.
    Describe {t} to someone from the year 1500.
    Compare {t} with something similar, in a table.
    What are common misunderstandings about {t}?
    What is the history of {t}?
    What would the world be like without {t}?
    Why do people care about {t}?
    Who invented or discovered things related to {t}?
    How have {t} changed in the last fifty years?
    How could a small town make better use of {t}?
    How do I start to learn about {t}? Make a plan for four weeks.
    Suggest a science fair project about {t}.
    Suggest names for a club devoted to {t} and explain each.
    Pretend to be a museum guide and tell visitors about {t}.
    Pretend you are a grumpy old sailor. What do you think of {t}?
    You are a patient teacher. A student asks: "Why does {t} matter?" Answer.
    Act as an interviewer and ask me questions about {t}, one after another.
    Argue for and then against more public money for {t}.
    Is it true that {t} will be less important in the future? Discuss.
    Translate the sentence "I have always been interested in {t}" into French, Spanish and German.
    Rewrite this sentence so that it sounds formal: "{t} are kind of cool and loads of people like them."
    Correct the grammar: "Me and him was talking about {t} yesterday, it were fun."
    Extract the main noun from each sentence: "I read about {t}. My sister laughed. The weather changed."
    Classify as positive, negative or neutral, with a reason: "I expected more from the exhibition on {t}."
    Give a JSON object that describes {t} with the keys name, category and summary.
    Give a numbered procedure for preparing a lesson on {t}.
    Continue the story: Nobody in the village had ever talked about {t}, until one morning
    Continue this text: When it comes to {t}, there are three things to remember.
    """.strip().splitlines()
]
"""What to do with a topic."""

CODE = [
    line.strip()
    for line in """
    reverses the words of a sentence; counts the vowels of a string; returns the second largest number of a list;
    checks whether a number is prime; computes the n-th Fibonacci number; merges two sorted lists; sorts a list of names
    by last name; removes duplicates from a list and keeps the order; converts Celsius to Fahrenheit; finds the longest
    word of a text; checks whether a bracket sequence is balanced; counts how often each word occurs; computes the
    greatest common divisor; transposes a matrix; flattens a nested list; validates an e-mail address; rotates a list by
    k places; finds all pairs that add up to a target; converts a Roman numeral to an integer; computes the mean and
    median of numbers; simulates rolling two dice; reads a CSV file and sums a column; writes lines to a file; parses a
    date; draws a triangle of stars; searches a sorted list by bisection; implements a stack; implements a queue with
    two stacks; represents a bank account; represents a library with books; computes the edit distance of two strings;
    finds the shortest path in a grid; prints the multiplication table; encodes text with a Caesar shift; counts the
    days between two dates; generates a random password; checks whether two words are anagrams; groups items by a key;
    computes compound interest; finds missing numbers in a range; tests whether a year is a leap year
    """.replace("\n", " ").split(";")
]
"""What a program should do."""

CODE_TASKS = [
    "Write a Python function that {c}.",
    "Write a Python function that {c}. Include a docstring and an example.",
    "Write a Python program that {c} and explain how it works.",
    "Write a JavaScript function that {c}.",
    "Write a C++ program that {c}.",
    "Write unit tests for a function that {c}.",
    "What is the time complexity of a program that {c}? Show the code.",
    "My Python code {c}, but it is slow. How can I make it faster?",
    "Explain to a beginner how to write a program that {c}.",
]
"""How to ask for it."""

CODE_WISHES = [
    "",
    " Keep it short.",
    " Add comments.",
    " Use only the standard library.",
    " Handle empty input.",
    " Then discuss two other ways to do it.",
    " Show the output for a small example.",
    " First describe the idea in one paragraph.",
]
"""What else to ask for."""

PEOPLE = ["Maria", "Tom", "Aisha", "Ben", "Yuki", "Carlos", "Nina", "Omar", "Lena", "Raj", "Sofia", "Paul"]
GOODS = ["apples", "pencils", "stickers", "marbles", "tickets", "cookies", "books", "eggs", "flowers", "coins"]
MATHS = [
    "{p} has {a} {g} and buys {b} more every day for {c} days. How many {g} does {p} have then?",
    "{p} shares {a} {g} equally among {c} friends and keeps the rest. How many are left over?",
    "A box holds {c} {g}. How many boxes does {p} need for {a} {g}?",
    "{p} sells {a} {g} for {c} dollars each and pays {b} dollars for the stand. What is the profit?",
    "A train travels {a} kilometres in {c} hours. What is its average speed, and how far does it get in {b} hours?",
    "{p} reads {b} pages a day. How long does a book of {a} pages take?",
    "A shirt costs {a} dollars and is reduced by {b} percent. What is the new price? Show each step.",
    "Solve for x: {c}x + {b} = {a}. Explain every step.",
    "What is {a} + {b} * {c}? Explain the order of operations.",
    "A rectangle is {b} metres long and {c} metres wide. Find its area and perimeter.",
    "{p} is {b} years old, and {p}'s aunt is {c} times as old. How old will the aunt be in {c} years?",
    "In a bag are {b} red and {c} blue marbles. What is the probability of drawing a red one?",
    "{p} had {a} {g}, gave away {b}, and then lost half of the rest. How many {g} are left?",
    "The numbers {b}, {c} and {a} are given. What are their sum, mean and largest difference?",
    "{p} earns {b} dollars an hour and works {c} hours on each of five days. After paying {a} dollars of rent, how "
    "much is left at the end of the week?",
    "A shop opens with {a} {g}. It sells {b} in the morning and twice as many in the afternoon, and then gets {c} new "
    "boxes of ten. How many {g} does it have now?",
    "{p} saves {b} dollars a week. A bicycle costs {a} dollars, and an uncle gives {c} dollars. How many weeks does "
    "{p} have to save?",
    "A class of {b} children collects {c} {g} per child. A third of all is given away. How many {g} remain?",
    "{p} walks {c} kilometres to school and back on every school day. How far is that in {b} weeks of five days?",
    "Tickets cost {b} dollars for adults and half of that for children. What do {c} adults and twice as many children "
    "pay together?",
    "{p} bakes {a} cookies, eats {c}, and packs the others in bags of {b}. How many full bags are there, and what do "
    "they bring at 3 dollars each?",
    "A tank holds {a} litres. It loses {c} litres an hour and is refilled by {b} litres once a day. What is in it "
    "after two days?",
]
"""Word problems: ``p`` a person, ``g`` goods, ``a`` > ``b``, ``c`` numbers."""

FACTS = [
    "It was described in detail for the first time in the nineteenth century.",
    "Experts still argue about the details.",
    "In a recent survey, two out of three people said that it plays a role in their lives.",
    "The costs have risen by about a tenth within two years.",
    "A local group meets every Tuesday to talk about it.",
    "Children tend to ask the best questions about it.",
    "Some regions depend on it more than others.",
    "Officials announced that a report will follow in spring.",
    "Critics say that the benefits are overstated, while supporters point to long experience.",
    "Most beginners make the same three mistakes.",
    "An old saying warns against taking it for granted.",
    "The first attempts failed, and nobody remembers why.",
]
"""Sentences about anything, from which passages to summarise are put together."""

READING = [
    "Summarise the following text in two sentences.\n\n{x}",
    "Read the passage and list its main points.\n\n{x}",
    "Give this text a title and rewrite it more simply.\n\n{x}",
    "Answer from the text only: what is said about costs or numbers?\n\n{x}",
    "Turn the text into a short news item.\n\n{x}",
]
"""What to do with a passage."""


def _topic_message(draw: random.Random, index: int) -> str:
    task, topic = TASKS[index % len(TASKS)], TOPICS[index // len(TASKS) % len(TOPICS)]
    text = task.format(t=topic)
    return text[0].upper() + text[1:]


def _code_message(draw: random.Random, index: int) -> str:
    task, work = CODE_TASKS[index % len(CODE_TASKS)], CODE[index // len(CODE_TASKS) % len(CODE)]
    wish = CODE_WISHES[index // len(CODE_TASKS) // len(CODE) % len(CODE_WISHES)]
    return task.format(c=" ".join(work.split())) + wish


def _maths_message(draw: random.Random, index: int) -> str:
    a, b, c = draw.randint(40, 400), draw.randint(5, 39), draw.randint(2, 12)
    return MATHS[index % len(MATHS)].format(p=draw.choice(PEOPLE), g=draw.choice(GOODS), a=a, b=b, c=c)


def _reading_message(draw: random.Random, index: int) -> str:
    topic = TOPICS[index // len(READING) % len(TOPICS)]
    passage = " ".join([f"This text is about {topic}.", *draw.sample(FACTS, 4)])
    return READING[index % len(READING)].format(x=passage)


KINDS = (
    (_topic_message, len(TASKS) * len(TOPICS), 0.62),
    (_code_message, len(CODE_TASKS) * len(CODE) * len(CODE_WISHES), 0.12),
    (_maths_message, len(MATHS) * 100, 0.16),
    (_reading_message, len(READING) * len(TOPICS), 0.10),
)
"""Makers of messages, the number of different ones each can make, and their shares."""


def messages(seed: int, shard: int, count: int) -> Iterator[str]:
    """``count`` user messages of one shard; the same arguments give the same messages.

    A kind's pairs are walked in one seeded order over all shards of equal ``count``.
    """
    draw = random.Random(f"messages {seed} {shard}")
    counts = [round(share * count) for _, _, share in KINDS]
    counts[0] += count - sum(counts)
    made = []
    for (maker, space, _), number in zip(KINDS, counts, strict=True):
        order = list(range(space))
        random.Random(f"order {seed} {maker.__name__}").shuffle(order)
        made += [maker(draw, order[(shard * number + i) % space]) for i in range(number)]
    draw.shuffle(made)
    yield from made
