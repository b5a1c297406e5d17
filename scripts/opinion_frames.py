"""Carriers of the opinions corpus: what is judged, in which setting, and what may follow."""

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


def as_object(subject: str) -> str:
    """Return the form that a verb takes."""
    return {"he": "him", "she": "her", "they": "them"}.get(subject, subject)
