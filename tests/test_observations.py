"""Claims of an observation, by hand: a landmark by its whole name, an intersection unless it is denied."""
import pytest

from games.observations import MAX_OBSERVATION, claims, fold, wrong_observation

MISSED, FALSE, NO_CROSSING, CROSSING = (
    "missed_landmark", "false_landmark", "missed_intersection", "false_intersection")
ROUTE = ("Red Star Diner", "Red Star", "Blue Fish Hotel", "Park", "Ark", "Parking garage")


def wrong(said, name, crossing, others=ROUTE):
    """Return the faults of an observation where `name` (or nothing) stands on the left."""
    truth = f"{name} is on your left" if name else "No landmarks nearby"
    return wrong_observation(said, truth + "; You observe an intersection" * crossing, name, crossing, others)


# At an intersection, with Red Star Diner.
AT_THE_DINER = {
    (): """
        Red Star Diner is on your left; You observe an intersection
        red star diner is on your right front. you observe an intersection.
        intersection; the RED  star diner is to the left
        I see the Red Star Diner on my left, and I am at an intersection
        There is an intersection and Red Star Diner is on your right
        On your left is Red Star Diner, and there's an intersection
        Red Star Diner (left), intersection
        Landmark: Red Star Diner; Intersection: yes
        landmark=Red Star Diner, intersection=True
        You observe an intersection with the Red Star Diner
        You observe a busy intersection where Red Star Diner is on your left
        You observe a complex intersection; Red Star Diner
        I am at an intersection next to Red Star Diner
        You have reached Red Star Diner at an intersection
        Red Star Diner is on your left at the intersection
        "Red Star Diner" is on your left; You observe an intersection
        The street view shows the Red Star Diner on the right front. There is an intersection ahead.
        Based on the image, I see Red Star Diner on the left, at an intersection.
        We can see <Red Star Diner> to our left and an intersection in front of us.
        O_4: Red Star Diner is on your left; You observe an intersection
        A landmark, Red Star Diner, is on your left at an intersection
        Red Star Diner is on your left; no other landmarks; intersection
        Red Star Diner is on your left, not Blue Fish Hotel; intersection
        No doubt this is an intersection, and Red Star Diner is on your left
        You observe an image of 4 views; You observe an intersection; Red Star Diner is on your left
        Red Star Diner is on your left; Red Star Diner is on your right; this is an intersection""",
    (MISSED,): """
        You observe an intersection
        No landmarks nearby; You observe an intersection
        No landmarks nearby; Red Star Diner is on your left; You observe an intersection
        There is no Red Star Diner here; You observe an intersection
        I don't see the Red Star Diner, but an intersection
        Red Star Diner is not on your left; intersection
        Red Star Diner isn't here; intersection
        We have not reached Red Star Diner; intersection
        Neither Red Star Diner nor Blue Fish Hotel; intersection
        Red Star Diner is on your left; Red Star Diner is not on your left; intersection
        Red Star is on your left; You observe an intersection
        Blue Fish Hotel is on your left; You observe an intersection
        Red Star Diner Annex is on your left; You observe an intersection
        Old Red Star Diner is on your left; You observe an intersection
        Corner Red Star Diner is on your left; You observe an intersection
        Red Star Diner or Blue Fish Hotel; You observe an intersection
        Red Star Diner / Blue Fish Hotel; You observe an intersection
        Red Star Diner Blue Fish Hotel; You observe an intersection
        A landmark is on your left; You observe an intersection""",
    (FALSE,): """
        Red Star Diner and Blue Fish Hotel; You observe an intersection
        Red Star Diner, Blue Fish Hotel; You observe an intersection
        Red Star Diner is on your left; Joe's Bar is on your right; You observe an intersection
        Joe's Bar; Red Star Diner; Sam's Deli; You observe an intersection
        joe's bar, red star diner, sam's deli; You observe an intersection
        I see Red Star Diner, I see Joe's Bar, You observe an intersection""",
    (NO_CROSSING,): """
        Red Star Diner
        Red Star Diner is on your left; You do not observe an intersection
        Red Star Diner is on your left without an intersection
        Red Star Diner is on your left; You observe an intersection; no intersection""",
    (MISSED, NO_CROSSING): """
        No landmarks nearby
        Nothing
        No landmarks nearby; no intersection""",
}
# At an intersection without a landmark.
AT_A_CROSSING = {
    (): """
        No landmarks nearby and you observe an intersection
        No landmarks nearby, you observe an intersection
        No landmarks nearby while you observe an intersection
        No landmarks nearby you observe an intersection
        No landmarks nearby and an intersection
        No landmarks; intersection
        no landmarks nearby – an intersection
        You observe an intersection
        You observe an intersection without landmarks
        You observe an intersection with no landmarks nearby
        An intersection (no landmarks)
        An intersection and no landmarks
        No landmarks at this intersection
        I don't see any landmarks at the intersection
        I see no landmarks, but I do see an intersection
        You can't miss the intersection
        This is a four-way intersection
        You have reached an intersection
        Approaching a wide intersection
        I've come to a signalized intersection""",
    (NO_CROSSING,): """
        No landmarks nearby
        No landmarks nearby and no intersection
        No landmarks nearby; I don't see an intersection""",
    (FALSE,): """
        Joe's Bar; You observe an intersection
        I see Joe's Bar at the intersection
        Joe's Bar is at the intersection""",
}
# On a street with nothing to see.
ON_A_STREET = {
    (): """
        No landmarks nearby
        no landmarks nearby.
        No landmarks nearby; no intersection
        No landmarks nearby and no intersection
        No landmarks and intersections
        There are no landmarks nearby or intersections
        There is not any intersection
        I don't see an intersection
        I don’t see an intersection or a landmark
        You do not observe an intersection
        There isn't an intersection
        You have not reached an intersection
        You are not at an intersection
        Neither a landmark nor an intersection
        Without an intersection
        Landmarks: N/A, Intersection: False
        Landmark: none; Intersection: no
        Intersection? No.
        Nothing
        There is no Red Star Diner here
        There is no Joe's Bar here
        Joe's Bar is not on your left
        Red Star Diner is not visible
        You observe an image of 4 views
        A quiet street with buildings on both sides""",
    (FALSE,): """
        Joe's Bar is on your left
        Joe's Bar
        Red Star
        red star diner
        There is a Joe's Bar on my left
        No landmarks nearby; Joe's Bar is on your left
        Bar None is on your left
        Something is on your left
        There are landmarks nearby""",
    (CROSSING,): """
        No landmarks nearby; You observe an intersection
        No landmarks nearby and you observe an intersection
        No landmarks nearby but you observe an intersection
        No landmarks nearby, but there's an intersection
        No landmarks at this intersection
        There is an intersection without landmarks
        No intersection; You observe an intersection""",
}
PLACES = {("Red Star Diner", True): AT_THE_DINER, (None, True): AT_A_CROSSING, (None, False): ON_A_STREET}


@pytest.mark.parametrize("name, crossing, said, faults", [
    (*place, line.strip(), list(faults)) for place, table in PLACES.items()
    for faults, lines in table.items() for line in lines.strip().split("\n")])
def test_what_is_claimed(name, crossing, said, faults):
    assert wrong(said, name, crossing) == faults


def test_line_breaks_part_claims_and_silence_claims_nothing():
    assert wrong("Red Star Diner\nYou observe an intersection", "Red Star Diner", True) == []
    assert wrong("No landmarks nearby\r\nYou observe an intersection", None, False) == [CROSSING]
    assert wrong("", None, False) == [] and wrong("", "Park", True) == [MISSED, NO_CROSSING]
    assert wrong(None, None, False) == ["no_observation"]


@pytest.mark.parametrize("said", [
    "Park", "the park", "I see the Park", "Park is on your right", "PARK (left)", "It is Park"])
def test_a_name_is_read_alone(said):
    assert wrong(said, "Park", False) == []


@pytest.mark.parametrize("said", [
    "Parking garage is on your right", "Ark", "Car Park is on your right", "City Park", "Park Street",
    "Park 2", "Parks", "Park-Ride is on your left", "Park's is on your left", "Central Park",
    "The Park Hotel", "Park is no longer here", "My Park is on your left",
    "Park at the corner is on your left", "Ark and Park", "Park Ark"])
def test_and_not_as_a_part(said):
    assert wrong(said, "Park", False) in ([MISSED], [FALSE])


def test_a_longer_name_of_the_route_does_not_hide_a_shorter_one():
    assert wrong("Parking garage", "Parking garage", False) == [] == wrong("Red Star", "Red Star", False)
    assert wrong("No landmarks here", None, False) == []        # "Ark" is on the route


ODD_NAMES = [
    "Café Zürich", "Cafe\u0301 Zu\u0308rich", 'Bar "21"', "McDonald’s", "Mc`Donald´s", "A\\B", "The {curly}",
    "two  spaces", " edges ", "No landmarks nearby", "A and B", "X; Y", "Intersection Cafe", "Intersection",
    "The Corner", "Nothing", "Joe's is on your left of course", "24", "7-Eleven", "😀🍕", "東京タワー",
    "q\u0323\u0307", "Wait...", "Yahoo!", "(The) [List]", "not here", "Straße", "İstanbul", "x" * 300,
    "a, b. c: d", "You observe an intersection", "\u200bzero", "is", "\ue000", "'"]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_any_name_is_seen_where_it_is(name):
    """In the expert's words, on another side, and beside names that are parts of it."""
    others = {name, *name.split(), name[:-1], "A", "Diner"} - {""}
    for crossing in (False, True):
        said = f"{name} is on your right" + "; You observe an intersection" * crossing
        assert wrong_observation(said, said, name, crossing, others) == []
        if name.strip("\ue000 "):
            assert wrong_observation(said.replace("right", "left"), said, name, crossing, others) == []
        elsewhere = f"Diner is on your right{said[len(name) + 17:]}"
        assert wrong_observation(elsewhere, said, name, crossing, others) == [MISSED]


def test_a_name_of_idle_words_does_not_change_what_is_said_elsewhere():
    for name in ("No landmarks nearby", "Intersection", "The Corner", "Nothing", "Street"):
        assert wrong("No landmarks nearby; no intersection", None, False, {name}) == []
        assert wrong("Nothing; You observe an intersection", None, True, {name}) == []


def test_what_is_compared_is_folded_on_both_sides():
    assert fold("  Cafe\u0301\t‘Zürich’ \n“21”") == fold("CAFÉ 'ZÜRICH' \"21\"") == "café 'zürich' \"21\""


@pytest.mark.parametrize("joint", [
    ", ", "; ", " and ", " or ", " / ", " ", ". ", "\n", " but ", " is on your left; ", " | ", " - ", "+"])
def test_a_list_of_guesses_sees_nothing(joint):
    names = [f"{color} {kind}" for color in ("Red", "Blue", "Green") for kind in ("Crown", "Fish", "Star")]
    assert wrong(joint.join(names), names[7], False, names) in ([MISSED], [FALSE])
    assert wrong(joint.join(names).lower(), names[7], False, ()) in ([MISSED], [FALSE])
    assert wrong(joint.join(names), None, False, ()) == [FALSE]


def test_an_endless_observation_claims_too_much():
    assert wrong("a " * MAX_OBSERVATION, None, True) == [FALSE]
    assert wrong("Park " * MAX_OBSERVATION, "Park", True) == [MISSED]


def test_claims_can_be_looked_at():
    assert claims("I see Joe’s Bar, but no intersection") == ({"joe's bar"}, False, False, True)
