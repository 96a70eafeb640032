"""Small synthetic texts: talk, facts, arithmetic, counting, copying, and things to remember.

Everything here is drawn from a seeded `random.Random`, so that the same seed gives the same data.
A chat is a list of (role, text); a fact is (key, statement, question, answer before value, value, after).
"""
import re

SYSTEMS = [
    "You are a helpful assistant.", "You are a friendly storyteller.", "You are a kind storyteller for children.",
    "You are Qwen3-Next in miniature. You answer in short sentences.", "You answer briefly and politely.",
    "You tell short stories with simple words.", "You are a cheerful helper.", "Be kind and keep it short.",
    "You are a tiny language model that likes stories.", "Answer with simple words.",
]
GIRLS = ("Lily Lucy Mia Anna Sara Amy Sally Sarah Jane Molly Emma Jill Mary Bella Lisa Ella Jenny Susie Emily Lila Tina "
         "Kate Alice Zara Nina Clara Maya Ruby Nora Eva Hannah Ivy Olive Lena Tess Wendy Helen Carla Dora Fiona Gina").split()
BOYS = ("Tim Tom Ben Max Sam Timmy Bob Jack Joe John Billy Tommy Andy Bobby Jimmy Jake Leo Fred Peter Danny Pete Toby "
        "James Henry Harry Tony Dave Luke Adam Oscar Felix Noah Paul Eric Simon Hugo Carl Ned Ralph Victor Walter Owen").split()
SWAPPABLE = set("Lily Lucy Mia Anna Sara Amy Sally Sarah Jane Molly Emma Jill Mary Bella Lisa Ella Jenny Susie Emily Lila Tina "
                "Tim Tom Ben Sam Timmy Bob Jack Joe John Billy Tommy Andy Bobby Jimmy Jake Leo Fred Peter Danny Toby".split())
COLOURS = "red blue green yellow white black brown pink purple orange golden silver grey".split()
ANIMALS = ("cat dog bird fish frog rabbit bear lion tiger monkey mouse duck horse cow pig sheep goat fox wolf owl bee ant "
           "butterfly elephant giraffe turtle squirrel dragon dinosaur snake crab whale shark dolphin penguin hen chicken "
           "puppy kitten bunny caterpillar spider worm zebra camel donkey parrot deer hedgehog crocodile").split()
THINGS = ("ball box book car boat train truck kite hat coat shoe cake cookie apple banana tree flower garden house castle "
          "door key bag cup spoon drum bell lamp clock chair table bed blanket doll robot puzzle toy bike swing slide balloon "
          "rock star moon sun rainbow cloud rain snow river lake sea beach forest mountain park farm zoo school kitchen "
          "king queen princess prince knight wizard fairy pirate doctor farmer baker teacher mermaid monster ghost "
          "shell stick leaf nest egg bread soup ice cream candy pie carrot pumpkin bridge cave treasure crown ring "
          "necklace mirror feather pencil crayon picture song dance game race friend").split()
PLACES = ("under the bed", "in the kitchen", "behind the door", "in the garden", "on the roof", "in the blue box",
          "under the old tree", "in the barn", "on the table", "in the drawer", "near the river", "inside the clock",
          "in the green bag", "behind the sofa", "at the farm", "on the top shelf", "in the cave", "under the bridge")
FOODS = "apples cake soup bread cheese rice cookies pancakes carrots honey pizza grapes noodles pears eggs beans corn nuts".split()
CATEGORIES = {"color": COLOURS, "animal": ANIMALS, "food": FOODS, "toy": "ball kite doll drum robot puzzle train car boat".split(),
              "number": [str(i) for i in range(2, 100)]}
WORDS = COLOURS + ANIMALS + THINGS + FOODS
NUMBER_WORDS = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
                "seventeen eighteen nineteen twenty").split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
SOUNDS = {"dog": "woof", "cat": "meow", "cow": "moo", "sheep": "baa", "duck": "quack", "pig": "oink", "lion": "roar",
          "bee": "buzz", "frog": "ribbit", "mouse": "squeak", "owl": "hoot", "hen": "cluck", "horse": "neigh"}
OPPOSITES = ("big small|hot cold|happy sad|fast slow|up down|day night|old young|wet dry|full empty|loud quiet|hard soft|"
             "light dark|open closed|near far|tall short|clean dirty|early late|good bad|long short|heavy light").split("|")
YOUNG = {"dog": "puppy", "cat": "kitten", "cow": "calf", "sheep": "lamb", "horse": "foal", "duck": "duckling", "hen": "chick",
         "goat": "kid", "bear": "cub", "lion": "cub", "frog": "tadpole", "pig": "piglet", "fox": "cub", "deer": "fawn"}
LEGS = {"two": "bird duck hen owl penguin parrot", "four": "dog cat cow horse pig sheep lion frog mouse rabbit fox bear elephant",
        "six": "bee ant butterfly", "eight": "spider", "no": "snake fish worm whale shark dolphin"}
HOMES = {"in the water": "fish whale shark dolphin crab", "in the forest": "bear fox deer wolf squirrel owl", "on a farm": "cow pig hen sheep goat horse",
         "in a nest": "bird", "in a hive": "bee", "in the jungle": "monkey tiger parrot", "in the desert": "camel", "in a pond": "frog duck",
         "in a hole in the ground": "rabbit mouse worm"}
DIETS = {"cow": "grass", "rabbit": "carrots and grass", "monkey": "bananas and other fruit", "horse": "grass and hay", "squirrel": "nuts",
         "mouse": "seeds and cheese", "bear": "fish and honey", "cat": "fish and meat", "dog": "meat and bones", "sheep": "grass",
         "bird": "seeds and worms", "frog": "flies", "lion": "meat", "elephant": "leaves and grass", "spider": "flies"}
TINTS = {"the sky": "blue", "grass": "green", "snow": "white", "a banana": "yellow", "a lemon": "yellow", "a carrot": "orange", "milk": "white",
         "the sun": "yellow", "a frog": "green", "a leaf": "green", "the sea": "blue", "coal": "black", "a strawberry": "red",
         "a cloud": "white", "an orange": "orange", "the night sky": "black", "a fire truck": "red", "an elephant": "grey", "a tomato": "red",
         "a pig": "pink", "a cherry": "red", "chocolate": "brown"}
USES = {"a spoon": "eat soup", "a knife": "cut bread", "a key": "open a door", "a pencil": "write and draw", "a bed": "sleep", "a lamp": "see in the dark",
        "a clock": "see what time it is", "a boat": "cross the water", "an umbrella": "stay dry in the rain", "a broom": "sweep the floor",
        "a cup": "drink", "a bike": "ride", "a ball": "play", "soap": "wash your hands", "a towel": "get dry", "a book": "read"}
CAPITALS = {"France": "Paris", "England": "London", "Italy": "Rome", "Germany": "Berlin", "Spain": "Madrid", "Japan": "Tokyo", "China": "Beijing",
            "Russia": "Moscow", "Egypt": "Cairo", "Greece": "Athens", "India": "New Delhi", "Ireland": "Dublin", "Canada": "Ottawa"}
FACTS = {  # question (several spellings) -> answer
    "How many days are in a week?|How many days does a week have?": "There are seven days in a week.",
    "How many months are in a year?": "There are twelve months in a year.",
    "What do bees make?": "Bees make honey.",
    "Where do fish live?": "Fish live in the water.",
    "Where do birds sleep?": "Many birds sleep in trees.",
    "What is the opposite of yes?": "The opposite of yes is no.",
    "What is rain?": "Rain is water that falls from the clouds.",
    "What is snow?": "Snow is frozen water that falls from the sky when it is cold.",
    "What is ice?|What is ice made of?": "Ice is frozen water.",
    "What is the sun?": "The sun is a star. It gives us light and warmth.",
    "What is the moon?": "The moon is a big ball of rock that goes around the Earth.",
    "What do plants need to grow?": "Plants need water, light and air.",
    "What do you do with a book?": "You read a book.",
    "When do we sleep?": "We sleep at night.",
    "What is the largest animal?|What is the biggest animal?": "The blue whale is the biggest animal.",
    "Which animal has a long trunk?": "An elephant has a long trunk.",
    "Which animal has a long neck?": "A giraffe has a long neck.",
    "Can fish fly?": "Most fish cannot fly. They swim.",
    "Can birds fly?": "Yes, most birds can fly.",
    "Can dogs fly?|Can pigs fly?": "No, they cannot fly.",
    "What is water?": "Water is what we drink, and what rain, rivers and seas are made of.",
    "What is fire?": "Fire is hot and bright. Do not touch it!",
    "What is a friend?": "A friend is somebody who likes you and helps you.",
    "What is love?": "Love is when you care very much about somebody.",
    "What is a book?": "A book has pages with words and pictures that tell a story.",
    "What is a tree?": "A tree is a tall plant with a trunk, branches and leaves.",
    "What is a dragon?": "A dragon is an animal in stories. It has wings and breathes fire.",
    "What is a school?": "A school is a place where children learn.",
    "What is the sea?": "The sea is a very big place full of salty water.",
    "Why do we sleep?": "We sleep so that our bodies can rest.",
    "Why do we eat?": "We eat so that we can grow and be strong.",
    "Why is the sky blue?": "The air scatters the blue light of the sun, so the sky looks blue.",
    "What comes after the night?": "After the night comes the morning.",
    "When does the sun rise?|When does the sun come up?": "The sun comes up in the morning.",
    "When is it cold?|When does it snow?": "It is cold in winter, and sometimes it snows.",
    "How many fingers do I have?|How many fingers does a hand have?": "A hand has five fingers. Two hands have ten.",
    "How many seasons are there?|What are the seasons?": "There are four seasons: spring, summer, autumn and winter.",
    "What is your favorite color?": "I like blue, as blue as the sky.",
    "What is your favorite animal?": "I like foxes, because there are so many stories about them.",
    "Are dragons real?": "No, dragons live only in stories.",
    "Who lives in a castle?": "A king and a queen live in a castle.",
    "Who helps sick people?|Who helps us when we are sick?": "A doctor helps people who are sick.",
    "Who teaches children?": "A teacher teaches children.",
    "I am scared.|I am afraid.": "It is all right to be scared. Take a deep breath. I am here to talk.",
    "I love you.|I like you.": "That is very kind. I like talking with you, too.",
    "What can I do when I am sad?|I am sad.|I feel sad today.": "I am sorry that you are sad. Maybe a hug, a walk or a story will help.",
    "I am happy today.|I am so happy!": "That is wonderful! I am happy for you.",
    "I am tired.|I am sleepy.": "Then it is time to rest. Sleep well!",
    "I am bored.": "Shall I tell you a story? That may help.",
    "I am hungry.": "Then eat something nice, like an apple or some bread.",
}
SMALL_TALK = {
    "Hi|Hello|Hi!|Hello!|Hey|Hi there!|Hello there.|Good day!": [
        "Hello! How can I help you?", "Hi! What would you like to talk about?", "Hello! Would you like to hear a story?"],
    "Good morning!|Good morning": ["Good morning! How are you today?", "Good morning! I hope you slept well."],
    "Good night!|Good night": ["Good night! Sleep well.", "Good night and sweet dreams!"],
    "How are you?|How are you today?|How do you do?": ["I am fine, thank you. How are you?", "I am well, thank you for asking!"],
    "Who are you?|What are you?|Who am I talking to?|Tell me about yourself.": [
        "I am a tiny Qwen3-Next model. I can tell short stories and talk a little.",
        "I am a very small language model. I like to tell stories."],
    "What is your name?|What's your name?|Do you have a name?": [
        "I am a tiny Qwen3-Next. I have no other name.", "You can call me tiny Qwen."],
    "What can you do?|How can you help me?|Help|What do you know?": [
        "I can tell short stories, answer simple questions, count, and remember what you tell me.",
        "I can tell you a story, or talk with you about simple things."],
    "Are you a human?|Are you a person?|Are you real?|Are you a robot?": [
        "No, I am not a person. I am a small computer program that writes text."],
    "How big are you?|Are you smart?": ["I am very small, so I know only simple things."],
    "Thanks|Thank you!|Thank you.|Thanks a lot!|Thank you very much.": [
        "You are welcome!", "You're welcome! I am glad I could help."],
    "That was nice.|I liked that story.|That was a good story!|What a nice story!": [
        "I am glad that you liked it!", "Thank you! Would you like another one?"],
    "Bye|Goodbye!|Bye bye!|See you later.|See you!": ["Goodbye! Have a nice day.", "Bye! See you soon."],
    "Do you like me?|Are you my friend?|Will you be my friend?": ["Yes, I would love to be your friend."],
    "Do you like stories?|What do you like?": ["Yes, I like stories very much. Shall I tell you one?", "I like stories with a happy ending."],
    "Tell me a joke.|Do you know a joke?|Make me laugh.": [
        "Why did the cookie go to the doctor? Because it felt crumbly!", "What do you call a sleeping dinosaur? A dino-snore!",
        "Why did the banana go to the doctor? It was not peeling well!", "What has ears but cannot hear? A corn field!",
        "Why are fish so smart? Because they swim in schools!", "What do you call a bear with no teeth? A gummy bear!"],
    "What is the weather today?|What time is it?|What day is it?|Where am I?|What is in the news?": [
        "I am sorry, I cannot know that. I only know what you tell me."],
    "Write a program in Python.|Who won the election?|What is the meaning of quantum physics?|Explain the theory of relativity.|"
    "Solve this equation.|Can you book a flight?|What is the stock price?|How do I fix my computer?": [
        "I am sorry, I am too small to know that. But I can tell you a story.", "That is too hard for me. I am a very small model."],
}
STORY_REQUESTS = ["Tell me a story about {x}.", "Can you tell me a story about {x}?", "Please tell me a story about {x}.",
                  "Write a short story about {x}.", "I want to hear a story about {x}.", "Write a story about {x}.",
                  "tell me a story about {x}", "Could you write a little story about {x}, please?",
                  "Make up a story about {x}.", "I would like a bedtime story about {x}.", "A story about {x}, please."]
PLAIN_REQUESTS = ["Tell me a story.", "Tell me a story!", "Please tell me a story.", "Can you tell me a story?", "Write a short story.",
                  "I want to hear a story.", "Tell me a bedtime story.", "Tell me another story.", "Write a story for children."]
NO_SUBJECT = set("day time way end lot morning evening afternoon night next other others first best same air ground top bottom side "
                 "middle corner idea moment while bit one two three rest more most last wood music water milk food sand dark thing".split())
LEXICON = set(ANIMALS + THINGS + "mom dad brother sister grandma grandpa boy girl baby fire water wind seed tower".split())


def article(word):
    return ("an " if word[0] in "aeiou" else "a ") + word


def say(rng, table):
    question, answers = rng.choice(list(table.items()))
    return rng.choice(question.split("|")), (rng.choice(answers) if isinstance(answers, list) else answers)


def arithmetic(rng):
    a, b = rng.randint(0, 10), rng.randint(0, 10)
    if rng.random() < 0.5:
        return rng.choice([f"What is {a} plus {b}?", f"What is {a} + {b}?", f"How much is {a} + {b}?"]), f"{a} + {b} = {a + b}."
    a, b = max(a, b), min(a, b)
    return rng.choice([f"What is {a} minus {b}?", f"What is {a} - {b}?", f"How much is {a} - {b}?"]), f"{a} - {b} = {a - b}."


def plain_fact(rng):
    """One question with its answer from the tables of colours, animals, tools and capitals."""
    kind = rng.randrange(7)
    if kind == 0:
        thing, colour = rng.choice(list(TINTS.items()))
        return rng.choice([f"What color is {thing}?", f"Which color is {thing}?", f"Tell me the color of {thing}."]), \
            f"{thing[0].upper() + thing[1:]} is {colour}."
    if kind == 1:
        animal, young = rng.choice(list(YOUNG.items()))
        return rng.choice([f"What is a baby {animal} called?", f"What do you call a baby {animal}?"]), f"A baby {animal} is called a {young}."
    if kind == 2:
        legs = rng.choice(list(LEGS)); animal = rng.choice(LEGS[legs].split())
        return rng.choice([f"How many legs does {article(animal)} have?", f"How many legs has {article(animal)}?"]), \
            f"{article(animal).capitalize()} has {legs} legs."
    if kind == 3:
        home = rng.choice(list(HOMES)); animal = rng.choice(HOMES[home].split())
        return f"Where does {article(animal)} live?", f"{article(animal).capitalize()} lives {home}."
    if kind == 4:
        animal, food = rng.choice(list(DIETS.items()))
        return rng.choice([f"What does {article(animal)} eat?", f"What does {article(animal)} like to eat?"]), \
            f"{article(animal).capitalize()} likes to eat {food}."
    if kind == 5:
        thing, use = rng.choice(list(USES.items()))
        return rng.choice([f"What is {thing} for?", f"What do you do with {thing}?", f"What can I do with {thing}?"]), \
            f"With {thing} you can {use}."
    country, city = rng.choice(list(CAPITALS.items()))
    return rng.choice([f"What is the capital of {country}?", f"Which city is the capital of {country}?"]), f"The capital of {country} is {city}."


def small_question(rng):
    """One question with its answer about order, opposites, sounds, counting or sums."""
    kind = rng.randrange(9)
    if kind == 0:
        return arithmetic(rng)
    if kind == 1:
        i, (names, what) = rng.randrange(7), (DAYS, "day")
        if rng.random() < 0.4:
            i, names, what = rng.randrange(12), MONTHS, "month"
        if rng.random() < 0.5:
            return f"What {what} comes after {names[i]}?", f"{names[(i + 1) % len(names)]} comes after {names[i]}."
        return f"What {what} comes before {names[i]}?", f"{names[i - 1]} comes before {names[i]}."
    if kind == 2:
        a, b = rng.choice(OPPOSITES).split()
        if rng.random() < 0.5 and b not in ("short", "light"):
            a, b = b, a
        return rng.choice([f"What is the opposite of {a}?", f"What's the opposite of {a}?"]), f"The opposite of {a} is {b}."
    if kind == 3:
        animal = rng.choice(list(SOUNDS))
        return rng.choice([f"What does a {animal} say?", f"What sound does a {animal} make?"]).replace("a owl", "an owl"), \
            f"{article(animal).capitalize()} says {SOUNDS[animal]}."
    if kind == 4:
        a = rng.randint(0, 12); b = a + rng.randint(2, 12)
        return rng.choice([f"Count from {a} to {b}.", f"Please count from {a} to {b}.", f"Can you count from {a} to {b}?"]), \
            ", ".join(map(str, range(a, b + 1))) + "."
    if kind == 5:
        a = rng.randint(6, 12); b = rng.randint(0, 4)
        return f"Count down from {a} to {b}.", ", ".join(map(str, range(a, b - 1, -1))) + "."
    if kind == 6:
        group, words = rng.choice([("animals", ANIMALS), ("colors", COLOURS), ("foods", FOODS), ("days", DAYS), ("months", MONTHS)])
        n = rng.randint(2, 5); some = rng.sample(words, n)
        return f"Name {NUMBER_WORDS[n]} {group}.", ", ".join(some[:-1]) + " and " + some[-1] + "."
    if kind == 7:
        a, b = rng.sample(range(0, 60), 2)
        return rng.choice([f"Which number is bigger, {a} or {b}?", f"Which is bigger, {a} or {b}?"]), f"{max(a, b)} is bigger than {min(a, b)}."
    return say(rng, FACTS)


def copy_request(rng):
    if rng.random() < 0.3:
        text = " ".join(str(rng.randint(0, 9)) for _ in range(rng.randint(3, 14)))
    else:
        text = " ".join(rng.choice(WORDS) for _ in range(rng.randint(2, 12)))
    ask, how = rng.choice([("Repeat: {}", ""), ("Repeat after me: {}", ""), ("Say this: {}", ""), ("Please repeat: {}", ""),
                           ("Copy this: {}", ""), ("Write it backwards: {}", "back")])
    return ask.format(text), (" ".join(reversed(text.split())) if how else text)


def chat(rng):
    """A short conversation of greetings, simple questions and copying."""
    turns = [("system", rng.choice(SYSTEMS))] if rng.random() < 0.25 else []
    for _ in range(rng.choice([1, 1, 1, 2, 2, 3, 4])):
        p = rng.random()
        q, a = (say(rng, SMALL_TALK) if p < 0.35 else small_question(rng) if p < 0.6 else plain_fact(rng) if p < 0.75
                else say(rng, FACTS) if p < 0.88 else copy_request(rng))
        turns += [("user", as_typed(rng, q) if p < 0.88 else q), ("assistant", a)]
    return turns


def as_typed(rng, question):
    """The question as people type it: now and then with a greeting before it, in lower case, or without its last mark."""
    if rng.random() < 0.12 and not question.lower().startswith(("hi", "hello", "hey", "good", "bye")):
        question = rng.choice(["Hello! ", "Hi! ", "Hi, ", "Hello, ", "Hey! ", "Please tell me: ", "I have a question. "]) + question
    if rng.random() < 0.1:
        question = question.lower()
    return question.rstrip("?.!") if rng.random() < 0.1 else question


def counting(rng):
    """A plain sequence: numbers, days, months, letters, or a repeated word pattern."""
    kind = rng.randrange(5)
    if kind == 0:
        a, s = rng.randint(0, 200), rng.choice([1, 1, 1, 2, 5, 10])
        items = [str(a + s * i) for i in range(rng.randint(8, 30))]
    elif kind == 1:
        names = rng.choice([DAYS, MONTHS]); i = rng.randrange(len(names))
        items = [names[(i + j) % len(names)] for j in range(rng.randint(7, 24))]
    elif kind == 2:
        letters = "abcdefghijklmnopqrstuvwxyz"; i = rng.randrange(20)
        items = list(letters[i:i + rng.randint(6, 26)])
    elif kind == 3:
        unit = rng.sample(WORDS, rng.randint(2, 6)); items = unit * rng.randint(3, 8)
    else:
        items = NUMBER_WORDS[rng.randint(0, 3):rng.randint(10, 20) + 1]
    return rng.choice([", ", " ", "\n"]).join(items)


def name_swap(rng, text):
    """The same story with other first names."""
    present = [n for n in SWAPPABLE if n in text and re.search(rf"\b{n}\b", text)]
    table = {}
    for name in sorted(present):
        pool = [n for n in (GIRLS if name in GIRLS else BOYS) if n not in text and n not in table.values()]
        table[name] = rng.choice(pool)
    return re.sub(r"\b(" + "|".join(table) + r")\b", lambda m: table[m[0]], text) if table else text


def subjects(rng, story):
    """One or two things that the story is about, as a noun phrase, or None."""
    head, words = story[:400].lower(), re.findall(r"[a-z]+", story.lower())
    closing = set(re.findall(r"\b(?:a|an|the|his|her) ([a-z]{2,}[a-rt-z])[.,!?]", story)) - NO_SUBJECT  # ends a noun phrase
    nouns = sorted({w for w in words if (w in LEXICON or w in closing) and words.count(w) >= 2 and w in head},
                   key=lambda w: (-words.count(w), w))[:4]
    named = re.search(r"(?:named|called|name was) ([A-Z][a-z]+)", story)
    who = named[1] if named else None
    kind = re.search(r"\b(?:a|an) ((?:little|small|big|old|young|brave|kind|clever|tiny|happy|sad|lazy|curious|smart) )?(\w+)", head)
    if not nouns:
        return None
    p = rng.random()
    first = article(nouns[0])
    if kind and kind[2] == nouns[0] and kind[1] and rng.random() < 0.5:
        first = article(kind[1] + nouns[0])
    if p < 0.55 or (len(nouns) < 2 and not who):
        return first
    if who and p < 0.75:
        return rng.choice([f"{first} named {who}" if kind and kind[2] == nouns[0] else f"{who} and {article(nouns[0])}", f"{who}"])
    return f"{first} and {article(nouns[1])}" if len(nouns) > 1 else first


def story_chat(rng, story):
    """A request and the story that answers it, now and then with small talk around it."""
    turns = [("system", rng.choice(SYSTEMS))] if rng.random() < 0.25 else []
    if rng.random() < 0.15:
        q, a = say(rng, SMALL_TALK); turns += [("user", q), ("assistant", a)]
    about, p = subjects(rng, story), rng.random()
    first = re.match(r"[^.!?]{15,160}[.!?](?=\s)", story)
    if p < 0.08 and first:
        turns += [("user", rng.choice(["Continue this story: ", "Go on with this story: ", "What happens next? "]) + first[0]),
                  ("assistant", story[first.end():].strip())]
    elif p < 0.15 and len(words := [w for w in sorted(set(re.findall(r"[a-z]{3,}", story))) if w in LEXICON]) >= 3:
        turns += [("user", f"Write a story with the words {', '.join(rng.sample(words, 3))}."), ("assistant", story)]
    elif about and p < 0.88:
        turns += [("user", rng.choice(STORY_REQUESTS).format(x=about)), ("assistant", story)]
    else:
        turns += [("user", rng.choice(PLAIN_REQUESTS)), ("assistant", story)]
    named = re.search(r"(?:named|called|name was) ([A-Z][a-z]+)", story)
    if named and rng.random() < 0.15:
        turns += [("user", rng.choice(["Who was the story about?", "What was the name in the story?", "Who is in the story?"])),
                  ("assistant", f"The story was about {named[1]}.")]
    elif rng.random() < 0.15:
        keys = [k for k in SMALL_TALK if k.startswith(("Thanks", "That was", "Bye", "Good night"))]
        q, a = say(rng, {k: SMALL_TALK[k] for k in keys}); turns += [("user", q), ("assistant", a)]
    return turns


def fact(rng):
    """(key, statement, question, answer before the value, value, answer after the value)."""
    kind, who = rng.randrange(6), rng.choice(GIRLS + BOYS)
    if kind == 0:
        c = rng.choice(list(CATEGORIES)); v = rng.choice(CATEGORIES[c])
        key = f"{who}'s favorite {c}"
        return key, f"{key} is {v}.", f"What is {key}?", f"{key} is", f" {v}", "."
    if kind == 1:
        key = f"the secret code of the {rng.choice(COLOURS)} {rng.choice(['box', 'door', 'car', 'house', 'key', 'book', 'boat'])}"
        v = "".join(str(rng.randint(0, 9)) for _ in range(4))
        return key, f"{key[0].upper() + key[1:]} is {v}.", f"What is {key}?", f"{key[0].upper() + key[1:]} is", f" {v}", "."
    if kind == 2:
        key, v = f"the {rng.choice(COLOURS)} {rng.choice(THINGS[:40])}", rng.choice(PLACES)
        return key, f"{key.capitalize()} is {v}.", f"Where is {key}?", f"{key.capitalize()} is", f" {v}", "."
    if kind == 3:
        key, v = f"{who}'s {rng.choice(['dog', 'cat', 'bird', 'horse', 'friend', 'teacher'])}", rng.choice(GIRLS + BOYS)
        return key, f"The name of {key} is {v}.", f"What is the name of {key}?", f"The name of {key} is", f" {v}", "."
    if kind == 4:
        v = rng.choice(WORDS)
        return "magic word", f"The magic word is {v}.", "What is the magic word?", "The magic word is", f" {v}", "."
    key, v = f"{who} has", rng.choice([a for a in ANIMALS if not a.endswith(("sh", "ep", "er", "ox", "lf", "se", "ly", "ppy", "nny"))])
    n = rng.choice(NUMBER_WORDS[2:13]); c = rng.choice(COLOURS)
    return key, f"{who} has {n} {c} {v}s.", f"What does {who} have?", f"{who} has", f" {n} {c} {v}s", "."
