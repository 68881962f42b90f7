"""Whisper's English text normaliser, applied before word error rates are computed.

     "Mr. O'Neil's twenty-two colours, um" --whisper_english--> mister 0 neil is 22 colors

It follows the twelve steps of Radford et al. 2022, Appendix C.  British forms become American by
rules of our own, which give 1701 of the 1739 pairs in openai's table.  On the 531 references of
How2's test clips the result is that of openai's own code; the package whisper-normalizer 0.1.15
differs on 15.  One difference is wanted: openai's leaves a "." as a word where a text ends in "..".

Public: whisper_english."""

import re
import unicodedata
from fractions import Fraction

FILLERS = re.compile(r"\b(hmm|mm|mhm|mmm|uh|um)\b")
INFORMAL = {
    r"won't": "will not", r"can't": "can not", r"let's": "let us", r"ain't": "aint",
    r"y'all": "you all", r"wanna": "want to", r"gotta": "got to", r"gonna": "going to",
    r"i'ma": "i am going to", r"imma": "i am going to", r"woulda": "would have",
    r"coulda": "could have", r"shoulda": "should have", r"ma'am": "madam",
    r"mr": "mister", r"mrs": "missus", r"st": "saint", r"dr": "doctor", r"prof": "professor",
    r"capt": "captain", r"gov": "governor", r"ald": "alderman", r"gen": "general",
    r"sen": "senator", r"rep": "representative", r"pres": "president", r"rev": "reverend",
    r"hon": "honorable", r"asst": "assistant", r"assoc": "associate", r"lt": "lieutenant",
    r"col": "colonel", r"jr": "junior", r"sr": "senior", r"esq": "esquire"}
INFORMAL_WORD = re.compile(r"\b(" + "|".join(sorted(INFORMAL, key=len, reverse=True)) + r")\b")
ENDINGS = ((r"'d(?= (?:been|gone|done)\b)", " had"), (r"'s(?= (?:been|gone|got)\b)", " has"),
           (r"n't\b", " not"), (r"'re\b", " are"), (r"'s\b", " is"), (r"'d\b", " would"),
           (r"'ll\b", " will"), (r"'t\b", " not"), (r"'ve\b", " have"), (r"'m\b", " am"))
LETTERS = str.maketrans({"œ": "oe", "ø": "o", "æ": "ae", "ß": "ss", "đ": "d", "ð": "d", "þ": "th",
                         "ł": "l"})

# "ninth" and "zeros" stay words, as in Whisper's
DIGITS = {word: i for i, word in enumerate(
    ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
     "fifteen sixteen seventeen eighteen nineteen").split())}
DIGITS |= {"o": 0, "oh": 0}
TENS = {word: 10 * i for i, word in enumerate(
    "twenty thirty forty fifty sixty seventy eighty ninety".split(), 2)}
POWERS = {"hundred": 100} | {word: 1000 ** i for i, word in enumerate((
    "thousand million billion trillion quadrillion quintillion sextillion septillion octillion "
    "nonillion decillion").split(), 1)}
ORDINALS = {"first": (1, "st"), "second": (2, "nd"), "third": (3, "rd"), "fifth": (5, "th"),
            "eighth": (8, "th"), "twelfth": (12, "th"), "zeroth": (0, "th"),
            **{f"{w}th": (DIGITS[w], "th") for w in DIGITS
               if w not in ("zero", "o", "oh", "one", "two", "three", "five", "eight", "nine",
                            "twelve")}}
PLURALS = {"sixes": (6, "s"),
           **{f"{w}s": (n, "s") for w, n in DIGITS.items() if n and w != "six"}}
ENDED = {**ORDINALS, **PLURALS}                                # number words with an ending
TENS_ENDED = {**{w[:-1] + "ieth": (n, "th") for w, n in TENS.items()},
              **{w[:-1] + "ies": (n, "s") for w, n in TENS.items()}}
POWERS_ENDED = {**{f"{w}th": (n, "th") for w, n in POWERS.items()},
                **{f"{w}s": (n, "s") for w, n in POWERS.items()}}
SIGNS = {"minus": "-", "negative": "-", "plus": "+", "positive": "+"}
UNITS = {"pound": "£", "pounds": "£", "euro": "€", "euros": "€", "dollar": "$", "dollars": "$",
         "cent": "¢", "cents": "¢"}
DECIMALS = {*DIGITS, *TENS}
NUMBER_WORDS = {*DECIMALS, *POWERS, *ENDED, *TENS_ENDED, *POWERS_ENDED, *SIGNS, *UNITS, "per",
                "percent", "and", "double", "triple", "point"}
# A longer row of digits is a word: Python converts no integer of more than 4300 digits.
NUMERAL = re.compile(r"\d{1,300}(\.\d{1,300})?$")


class SpokenNumbers:
    """Words -> words with the numbers among them written in digits: 'nineteen eighty four' ->
    '1984', 'two hundred and five' -> '205', 'twenty dollars' -> '$20'."""

    def __init__(self, words):
        self.words, self.out, self.number, self.sign = words, [], None, ""

    def say(self, word):
        self.out.append(self.sign + word)
        self.sign = ""

    def flush(self, *more, ending="", unit=""):
        """Ends the number at hand, if any; `more` words follow it."""
        if self.number is not None:
            self.sign = unit or self.sign
            self.say(f"{self.number}{ending}")
        self.number = None
        for word in more:
            self.say(word)

    def append(self, digits):
        """'nineteen' 'eighty' -> '1980': said one after the other, not a sum."""
        self.number = f"{self.number or ''}{digits}"

    def below_twenty(self, value, before):
        number = self.number
        if number is None:
            self.number = value
        elif isinstance(number, str) or before in DIGITS:
            if before in TENS and value < 10:                          # 'nineteen eighty' 'four'
                self.number = number[:-1]
            self.append(value)
        elif number % (10 if value < 10 else 100) == 0:
            self.number += value
        else:
            self.append(value)

    def tens(self, value):
        if self.number is None:
            self.number = value
        elif isinstance(self.number, str) or self.number % 100:
            self.append(value)
        else:
            self.number += value

    def power(self, value):
        number = self.number
        if number is None:
            self.number = value
        elif isinstance(number, str) or number == 0:
            decimal = re.fullmatch(r"\d{0,300}\.?\d{1,300}", str(number))  # "three point five ..."
            times = Fraction(number) * value if decimal else Fraction(1, 2)
            if times.denominator > 1:
                self.flush()
            self.number = int(times) if times.denominator == 1 else value
        else:                                     # 'two thousand' 'three' 'hundred': 2000 + 3 * 100
            self.number = number // 1000 * 1000 + number % 1000 * value

    def numeral(self, sign, word):
        if isinstance(self.number, str) and self.number.endswith("."):
            self.append(sign + word)
            return
        self.flush()
        self.sign = sign or self.sign
        whole = Fraction(word).denominator == 1                                        # 2.0
        self.number = int(Fraction(word)) if whole else word

    def special(self, word, before, after):
        """Words that are part of a number only in company."""
        can_follow = after in NUMBER_WORDS or bool(NUMERAL.match(after))
        there = self.number is not None
        if there and word in UNITS:
            self.flush(unit=UNITS[word])
        elif there and (word == "percent" or word == "per" and after == "cent"):
            self.flush(ending="%")
        elif word == "and" and can_follow and before in POWERS:
            pass
        elif word in SIGNS and can_follow:
            self.flush()
            self.sign = SIGNS[word]
        elif word == "point" and can_follow:
            if after in DECIMALS or NUMERAL.match(after):
                self.append(".")
        elif word in ("double", "triple") and after in DIGITS:
            self.append(str(DIGITS[after]) * (2 if word == "double" else 3))
        else:
            self.flush(word)

    def read(self):
        words, skip = ["", *self.words, ""], False
        for before, word, after in zip(words, words[1:], words[2:], strict=False):
            sign = word[:1] if word[:1] in set("-+£€$¢") else ""
            if skip:
                skip = False
                continue
            skip = (word in ("double", "triple") and after in DIGITS
                    or word == "per" and after == "cent" and self.number is not None)
            if NUMERAL.match(word[len(sign):]):
                self.numeral(sign, word[len(sign):])
            elif DIGITS.get(word) == 0:
                self.append(0)
            elif word in DIGITS:
                self.below_twenty(DIGITS[word], before)
            elif word in TENS:
                self.tens(TENS[word])
            elif word in POWERS:
                self.power(POWERS[word])
            elif word in ENDED:
                self.below_twenty(ENDED[word][0], before)
                self.flush(ending=ENDED[word][1])
            elif word in TENS_ENDED:
                self.tens(TENS_ENDED[word][0])
                self.flush(ending=TENS_ENDED[word][1])
            elif word in POWERS_ENDED:
                self.power(POWERS_ENDED[word][0])
                self.flush(ending=POWERS_ENDED[word][1])
            elif word:
                self.special(word, before, after)
        self.flush()
        return self.out


def numbers_in_digits(text):
    *parts, end = re.split(r"\band\s+a\s+half\b", text)
    for i, part in enumerate(parts):            # a half of nothing is not said, as in Whisper's
        number = part.split()[-1:]
        half = "point five" if {*number} & {*DECIMALS, *POWERS} else "and a half" if number else ""
        parts[i] = f"{part} {half} "
    text = re.sub(r"(?<=[a-z])(?=\d)|(?<=\d)(?=[a-z])", " ", "".join(parts) + end)
    text = re.sub(r"(?<=\d)\s+(?=(?:st|nd|rd|th|s)\b)", "", text)
    text = " ".join(SpokenNumbers(text.split()).read())
    text = re.sub(r"([€£$]\d+) (?:and )?¢(\d{1,2})\b", lambda m: f"{m[1]}.{int(m[2]):02d}", text)
    text = re.sub(r"[€£$]0.(\d{1,2})\b", lambda m: f"¢{int(m[1])}", text)
    return re.sub(r"\b1(s?)\b", r"one\1", text)


# British -> American: stems with the endings that follow them, then single words.
OUR = ("arb ard arm behavi misbehavi belab cand clam clang col discol multicol technicol tricol "
       "watercol demean misdemean enam endeav fav disfav unfav ferv flav harb hon dishon hum lab "
       "neighb od parl ranc rig rum sav savi unsav splend succ tum val vap vig")
RE = ("calib cent epicent fib goit kilomet centimet millimet micromet lit centilit millilit louv "
      "lust lacklust meag met mit nit och reconnoit sab saltpet scept sepulch somb spect theat "
      "amphitheat")
ISE = "al|an|ar|at|en|er|et|ic|il|im|in|it|ol|on|or"           # realise; not promise, exercise
ISE_STEMS = ("amort apolog bapt bastard caramel collectiv crystall custom deput econom empath "
             "emphas overemphas energ epitom eulog evangel exorc fantas fratern ghetto hybrid "
             "hypnot hypothes immun ion item jeopard liquid miniatur modern moistur ostrac oxid "
             "passiv pasteur philosoph plagiar pressur propagand proselyt random recogn unrecogn "
             "rhapsod satir sodom solemn standard subsid sympath synchron synthes terror tyrann "
             "util vandal victim western")
YSE = "anal breathal catal paral psychoanal"
DOUBLED_L = ("backpedal bedevil bejewel bevel cancel carol cavil channel chisel council counsel "
             "cruel cudgel dial disembowel dishevel drivel duel enamel equal unequal fuel refuel "
             "funnel gambol gravel grovel gruel impanel imperil initial jewel label level libel "
             "marshal marvel model remodel panel parcel pedal pencil quarrel ravel unravel revel "
             "rival unrival shovel shrivel signal snivel snorkel spiral squirrel stencil swivel "
             "tassel total towel trammel untrammel travel trial tunnel weasel yodel")
SPELLING_RULES = tuple((re.compile(r"\b(" + stems.replace(" ", "|") + ")" + pattern), new)
                       for stems, pattern, new in (
    (OUR, r"our(?=s?\b|ed|ing|er|abl|ful|less|ite|it|iz|hood|l[yi]|y|ies|is[tm]|al|ant|some)",
     r"\1or"),
    (RE, r"re(?=s?\b|fold|goer|glass|piece)", r"\1er"), (RE, r"red\b", r"\1ered"),
    ("tranquil", r"l(?=[isz])", r"\1"),
    (ISE_STEMS + " tranquil", r"is(?=e|ing|ation|abl)", r"\1iz"),
    (rf"(?!treat)\w{{2,}}(?:{ISE})", r"is(?=e[drs]?\b|ers\b|ing)", r"\1iz"),
    (YSE, r"ys(?=ed?\b|ing|er|es\b)", r"\1yz"),
    (r"(?!improv)\w+", r"is(?=ation(?:s|al)?\b)", r"\1iz"),
    (DOUBLED_L, r"l(?=ed\b|ing|er|est\b|ist|ous|or)", r"\1"),
    ("cata dia ana mono epi pro", r"logue(s?)\b", r"\1log\2"),
    ("def off pret", r"ence(s?|less)\b", r"\1ense\2"),
    ("licen", r"c(?=e[ds]?\b|ing\b)", r"\1s"),
    ("skil wil", r"ful(?=ly\b|ness\b|\b)", r"\1lful"),
    ("fulfil enrol instal appal instil distil enthral", r"(?=s\b|ments?\b|\b)", r"\1l"),
    ("m rem sm", r"oul(?=d|t)", r"\1ol"), ("worship", r"p(?=ed|ing|er)", r"\1"),
    ("conn infl", r"exion", r"\1ection"), ("epaul omel", r"ette(?=s?\b)", r"\1et"),
    ("", r"grey(?=s?\b|ed|ing|ness|ish)", "gray"),
    ("", r"cos(?=y\b|i(?:er|es|est|ly|ness)\b)", "coz"),
    ("", r"gag(?=e[ds]?\b|ing\b)", "gaug"), ("out|", r"manoeuvre(?=s?\b)", r"\1maneuver"),
    ("out|", r"manoeuvr", r"\1maneuver"), (r"\w*", r"gramme(?=s?\b)", r"\1gram"),
    ("snow|", "plough", r"\1plow"), ("", "draught", "draft"), ("", "gaol", "jail"),
    ("", "chequer", "checker"), ("", "cheque", "check"), ("", "sceptic", "skeptic"),
    ("", "moustach", "mustach"), ("", "sulph", "sulf"), ("", "yogho?urt", "yogurt"),
    ("an|", r"aesth(?=etes?\b|etic(?:s|ally)?\b|esi|eti[sz])", r"\1esth"),
    ("", "haem(?=[ao])", "hem"), ("ortho encyclo ", "paed", r"\1ped"),
    ("", "gynaec", "gynec"), ("", "palaeo", "paleo"), ("", "faec", "fec"), ("", "foet", "fet"),
    ("", "homoeo", "homeo"), ("", "oe(?=dem|soph|str)", "e"), ("", "ae(?=on|tio)", "e"),
    ("archa", r"e(?=olog(?:y|ist|ically))", "arche"), ("leuk an tox", r"aem(?=i[ac])", r"\1em"),
    ("medi prim", "aeval", r"\1eval"), ("diar gonor", "rhoea", r"\1rhea")))
SPELLING_WORDS = dict(pair.split(":") for pair in (
    "glamor:glamour tyre:tire tyres:tires jewellery:jewelry pyjamas:pajamas pyjama:pajama "
    "aluminium:aluminum aeroplane:airplane aeroplanes:airplanes judgement:judgment ageing:aging "
    "artefact:artifact artefacts:artifacts axe:ax behove:behoove behoved:behooved "
    "behoves:behooves chilli:chili practise:practice practised:practiced practises:practices "
    "practising:practicing storey:story storeys:stories waggon:wagon waggons:wagons "
    "woollen:woolen woollens:woolens woolly:wooly woollies:woolies phoney:phony likeable:likable "
    "cypher:cipher cyphers:ciphers cancelation:cancellation cancelations:cancellations disc:disk "
    "discs:disks videodisc:videodisk videodiscs:videodisks fillet:filet fillets:filets "
    "filleted:fileted filleting:fileting accoutrements:accouterments tonne:ton tonnes:tons "
    "busses:buses bussing:busing minibusses:minibuses gasses:gases sheikh:sheik flautist:flutist "
    "flautists:flutists gipsies:gypsies chimaera:chimera chimaeras:chimeras "
    "caesarean:cesarean caesareans:cesareans philtre:filter philtres:filters baulk:balk "
    "baulked:balked baulking:balking baulks:balks syphon:siphon syphons:siphons "
    "calliper:caliper callipers:calipers bannister:banister bannisters:banisters "
    "almanack:almanac almanacks:almanacs groyne:groin groynes:groins gryphon:griffin "
    "gryphons:griffins mhm:hmm mmm:hmm misspelt:misspelled").split())


def american(text):
    """Each word in its American form; the forms of SPELLING_WORDS first, then one of the rules."""
    text = " ".join(SPELLING_WORDS.get(word, word) for word in text.split())
    for pattern, replacement in SPELLING_RULES:
        text = pattern.sub(replacement, text)
    return text


def without_brackets(text, inside, closing):
    """Takes brackets and what they hold out of the text, in linear time: behind the last closing
    bracket nothing is looked for."""
    end = max(map(text.rfind, closing)) + 1
    return re.sub(inside, "", text[:end]) + text[end:]


def whisper_english(text):
    """English text -> its words after the twelve steps of Radford et al. 2022, Appendix C."""
    text = text.lower()
    text = without_brackets(text, r"[<\[][^>\]]*[>\]]", ">]")          # 1
    text = without_brackets(text, r"\([^)]+\)", ")")                    # 2
    text = FILLERS.sub("", text)                                        # 3
    text = re.sub(r"(?<!\s)\s+'", "'", text)                            # 4
    text = INFORMAL_WORD.sub(lambda match: INFORMAL[match[0]] + " ", text)      # 5
    for ending, full in ENDINGS:
        text = re.sub(ending, full, text)
    text = re.sub(r"(\d),(\d)", r"\1\2", text)                          # 6: "1,2,3" -> 12,3
    text = re.sub(r"\.(?!\d)", " ", text)                               # 7
    decomposed = unicodedata.normalize("NFKD", text.translate(LETTERS))
    text = "".join(c if c in ".%$¢€£" else "" if unicodedata.category(c) == "Mn"
                   else " " if unicodedata.category(c)[0] in "MSP" else c
                   for c in decomposed)                                 # 8
    text = american(numbers_in_digits(text))                            # 9, 10
    text = re.sub(r"[.$¢€£](?!\d)", " ", text)                          # 11
    text = re.sub(r"(?<!\d)%", " ", text)
    return text.split()                                                 # 12
