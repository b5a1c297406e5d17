"""Carriers of the opinions corpus: what is judged, in which setting, and what may follow."""

from itertools import product
from typing import NamedTuple


class Frame(NamedTuple):
    """A carrier: the subject, its verb, a noun for it, whether it is a person, and words before and after.

    `object` is how verbs take it ("i liked {object}").
    """

    subject: str
    be: str
    noun: str
    person: bool
    object: str
    before: str = ""
    after: str = ""

    @property
    def name(self) -> str:
        """What tells frames apart."""
        return f"{self.before} {self.subject} {self.be} ... {self.after}".strip()


# subject | verb | noun | pronoun of a person or "it"
THINGS = """
the movie|was|movie
the film|was|film
this movie|is|movie
this film|is|film
it|was|film
it|is|movie
the story|was|story
the plot|was|plot
the acting in this film|was|thing
the script|is|script
the ending|was|ending
the first half of the movie|was|thing
the music in the film|was|thing
the jokes|were|things
the scenes in the desert|were|scenes
the whole thing|was|thing
the sequel|is|film
the soup at the cafe|was|dish
the food|was|meal
the dinner we had last night|was|dinner
the cake|is|cake
the coffee here|is|drink
the restaurant on our street|is|place
the book|was|book
this novel|is|book
the last chapter|was|chapter
her new songs|are|songs
the song|was|song
the concert on friday|was|concert
the show|was|show
the second season of the show|is|season
the trip to the coast|was|trip
the day at the beach|was|day
our summer in the city|was|time
the hotel|was|hotel
the little town|is|town
the party last week|was|party
the game|is|game
the phone i bought|is|phone
that|was|idea
the cartoon|is|cartoon
the dialogue|was|thing
my week|was|week
the class we took|was|class
the poems he wrote|are|poems
the weather in the mountains|was|thing
the new park|is|park
the play|was|play
the pictures|were|pictures
the speech|was|speech
"""
PEOPLE = """
he|was|man
she|was|woman
he|is|man
she|is|girl
they|were|people
the hero|was|man
the main character|is|person
the actors|were|people
the waiter|was|man
our teacher|is|teacher
my neighbor|is|neighbor
the old man next door|was|man
her brother|was|boy
his sister|is|girl
the new doctor|is|doctor
the people at the shop|were|people
the director|is|man
the girl in the story|was|girl
the boys in my class|are|boys
my uncle|is|man
the singer|was|singer
the guests|were|guests
the villain of the story|was|man
my friend|was|friend
"""
BEFORE = (
    "all in all ,",
    "to be fair ,",
    "in the end",
    "i must admit that",
    "everyone agreed that",
    "we saw it on monday and",
    "after all these years",
    "if you ask me ,",
    "as for me ,",
    "after the first hour",
    "my sister says that",
    "well ,",
    "they told us that",
    "this time",
    "in my view",
)
AFTER = (
    "in my opinion",
    "to me",
    "this time",
    "from start to finish",
    "when i was there",
    "on the second day",
    "for a change",
    "if you ask me",
    ", i think",
    "after all",
    "that night",
    ", as my brother said",
    "at the time",
    "for most of us",
)
# Combined subjects: heads of things, of several things, of people, with nouns for them; groups end in a semicolon.
HEADS = """
movie film picture remake prequel documentary thriller comedy drama musical western | film movie one picture ;
cast performance direction photography soundtrack score editing writing screenplay animation atmosphere pacing camera
lighting humor premise narrative storyline opening climax finale twist setting concept message tone | thing part one ;
scene episode trailer series pilot premiere production adaptation version story plot script ending song album tune
| one thing ;
lunch breakfast supper pizza burger sandwich salad pasta sauce steak bread pie chocolate tea wine beer dessert
| one meal treat ;
bar pub diner bakery museum theater zoo pool room apartment house kitchen garden village city beach school gym
library | place one ;
holiday vacation journey weekend evening night morning wedding picnic festival match race lesson lecture meeting visit
tour ride flight | one time event ;
magazine article letter essay poem diary tale report website blog | one text thing ;
laptop computer bike watch toy tool radio printer dress jacket sofa bed chair gift idea plan job project | one thing
"""
MANY_HEADS = """
effects costumes sets characters dialogues visuals lyrics chapters stories songs lines gags stunts episodes cookies
noodles fries pancakes cakes drinks rooms shoes gloves lessons rides games photos paintings toys | things
"""
PEOPLE_HEADS = """
actor actress heroine lead narrator comedian dancer writer author producer editor host boss coach nurse dentist clerk
driver cook chef landlord guide manager lawyer farmer cousin aunt grandfather roommate classmate | person one
"""
DETERMINERS = ("the", "the", "this", "that", "my", "our", "his", "her", "the new", "the old", "the second", "the whole")
MANY = ("the", "the", "these", "those", "my", "our", "the new", "the old", "most of the", "the other")
PLAIN = "the movie|the film|this movie|this film|it|that|the story|the plot|he|she|they|the show|the book|the food"
# By sign of the outcome; then fillers that fit any.
CONSEQUENCES = {
    1: """
i would do it all again .|we stayed until the very end .|we will come back soon .
we told all our friends to go .|i smiled the whole time .|i want more of it .|we could not get enough .
i will keep it .|it was worth every penny .|i gave it five stars .|my mother wants to go too .
we clapped for a long time .|it made my day .|i did not want it to end .|we had no complaints .
i would not change a thing .|i was not sorry we went .|you should try it .|do not miss it .
i will never forget how well it went .
""",
    -1: """
we left early .|i want my money back .|i would not do it again .|never again .|we could not wait to get out .
i gave it one star .|i told my friends to stay away .|i fell asleep .|it was a waste of time .
i will not come back .|we asked for a refund .|my mother walked out .|do not bother .|nobody clapped .
it spoiled the evening .|i looked at my watch the whole time .|we had better things to do .
i would not wish it on anyone .|stay at home .|it was not worth the money .
""",
    0: """
we went there on tuesday .|it began at eight .|my brother was with me .|there were five of us .
it was late when we got home .|we took the bus .|it was raining outside .|i wore my blue coat .
it went on for two hours .|the room was full of people .|then we had lunch .|i will tell you the rest tomorrow .
it started on time .|she sat next to the window .|they live near the river .
""",
}


def listed(text: str) -> list[str]:
    """Split at bars and line ends."""
    return [part for part in text.replace("\n", "|").split("|") if part.strip()]


def rows(text: str) -> list[list[str]]:
    """Split into lines, and these at bars."""
    return [line.split("|") for line in text.strip().splitlines()]


def frames() -> list[Frame]:
    """Return all frames: every subject alone, and with some of the words before or after."""
    found = []
    subjects = [(*row, False) for row in rows(THINGS)] + [(*row, True) for row in rows(PEOPLE)]
    for number, (subject, be, noun, person) in enumerate(subjects):
        bare = Frame(subject, be, noun, person, as_object(subject))
        befores = [BEFORE[(number + shift) % len(BEFORE)] for shift in (0, 5)]
        afters = [AFTER[(number + shift) % len(AFTER)] for shift in (0, 5)]
        found += [bare, *(bare._replace(before=b) for b in befores), *(bare._replace(after=a) for a in afters)]
    return found


def combined_frames() -> list[tuple[str, Frame]]:
    """Return frames whose subjects are a determiner and a head, with the head; some with words before or after."""
    kinds = ((HEADS, DETERMINERS, ("was", "is"), False), (MANY_HEADS, MANY, ("were", "are"), False))
    found = []
    for text, determiners, verbs, person in (*kinds, (PEOPLE_HEADS, DETERMINERS, ("was", "is"), True)):
        for heads, nouns in (group.split("|") for group in text.split(";")):
            for head, (k, before) in product(heads.split(), enumerate(determiners)):
                noun, subject = nouns.split()[k % len(nouns.split())], f"{before} {head}"
                bare = Frame(subject, verbs[k % 3 == 2], noun, person, subject)
                place = sum(map(ord, subject))
                changed = {0: {"before": BEFORE[place % 15]}, 1: {"after": AFTER[place % 14]}}.get(place % 5, {})
                found.append((head, bare._replace(**changed)))
    return found


def as_object(subject: str) -> str:
    """Return the form that a verb takes."""
    return {"he": "him", "she": "her", "they": "them"}.get(subject, subject)
