"""The tokenizer of the tiny models: known words and name parts as whole tokens, any other text as bytes.

A Unigram model over byte-level text, built from a word list instead of being trained: every listed piece costs the
same, a single byte costs more, so the segmentation with the fewest pieces wins. Decoding gives the text back exactly.
The class is the plain fast tokenizer, which ``AutoTokenizer`` opens unharmed for architectures without a tokenizer
class of their own.
"""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rag_rl.tiny.world import NOUNS, PREFIXES, RELATIONS, SUFFIXES

PAD, EOS, START = "<|endoftext|>", "<|im_end|>", "<|im_start|>"

# Minimal ChatML. The generation markers let TRL's assistant-only loss find the assistant's tokens.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Words of the prompts, of the step grammar and of everyday English, so that text from outside the world costs about
# two letters a token instead of one.
WORDS = """
a about after again against all also am an analysis and another answer answers any are around as at away back be became
because been before began being between big book born both but by called came can cannot century city come could
country day days died did do document documents does down during each early end even every family famous few film final
find first follow for found four from game gave general get given go gold good government great group had has have he
head her here him his history home house how I if in included including information into is it its itself John judge
just kind knew know known language large last late later led left level life like line list little located long made
make making man many may me means member men might more most mother much music must my name named near need needs never
new next night no north not now number of off often old on once one only or order other our out over own page part
party passage passages people person place play please point political population power president problem produced
public published query question questions read record released retrieval right river role same school score season
second see series served set several she should show shows side since small so some song south state States step still
story studies such system take team television than that the their them then there these they third this three through
time times title to today together too took town two under United until up upon us use used user using very village
want war was water way we well went were west what when where whether which while who whom whose why will with without
woman word words work works world would write written wrong year years yes yet York you your assistant system false
true null of course I think it is I am sure let me say surely need the
""".split()
FRAGMENTS = """
able age al an ance ar as at ate ation be ca ce ch ck co com con de di ed el en ence ent er es est et ex ful ge gh he
ia ic id ies il in ing ion ir is ish ism ist it ite ity ive ize ke la le les li ll lo ly ma me ment mo na nd ne ness ng
ni no nt o of ol on or ou ous ow per ph po pre pro ra re ri ro sc se sh si ss st sy ta te ter th ti tion to tr tu ty ul
um un ur us ut ve ver vi wa wi
""".split()
MARKS = [". ", ", ", *".,:;?!'\"()[]{}-#/&%$*+=<>_`~^@|\\", '{"', '":', "}", '{"score', "\n", "\n\n"]
# A part of a name is cheaper than a word, so that " Norabert" is " Nor" + "abert" and never " No" + "rabert".
FIRST_PIECE = 3 + 256  # ids below are the special tokens and the single bytes
SCORE_OF_NAME_PART, SCORE_OF_PIECE, SCORE_OF_BYTE = -9.0, -10.0, -15.0


def pieces() -> list[str]:
    """Every multi-letter piece of the vocabulary, with and without a leading space, in a fixed order.

    Returns:
        Pieces as plain text.
    """
    sentences = [s for r in RELATIONS for s in (*r.phrasings, *r.questions, r.noun, r.follow_up)]
    text = " ".join(sentences).replace("{s}", " ").replace("{v}", " ")
    words = [w.strip(".?") for w in text.split()]
    words += [noun for nouns in NOUNS.values() for noun in nouns] + list(WORDS) + [str(d) for d in range(10)]
    words = [w for w in dict.fromkeys(words) if w]
    names = [form for prefix in PREFIXES for form in (f" {prefix}", prefix)]
    endings = [suffix for suffixes in SUFFIXES.values() for suffix in suffixes]
    forms = [f for w in words for f in (f" {w}", w, w.capitalize(), f" {w.capitalize()}")]
    return list(dict.fromkeys([*MARKS, *names, *endings, *forms, *FRAGMENTS]))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Builds the tokenizer; the same list gives the same ids.

    Returns:
        A fast tokenizer with pad, end-of-turn and chat template set.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    encoded = ["".join(part for part, _ in byte_level.pre_tokenize_str(piece)) for piece in pieces()]
    vocabulary = [(token, 0.0) for token in (PAD, EOS, START)]
    vocabulary += [(byte, SCORE_OF_BYTE) for byte in alphabet]
    parts = {*PREFIXES, *(f"Ġ{prefix}" for prefix in PREFIXES)}.union(*SUFFIXES.values())
    longer = [piece for piece in encoded if piece not in set(alphabet)]
    vocabulary += [(piece, SCORE_OF_NAME_PART if piece in parts else SCORE_OF_PIECE) for piece in longer]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        additional_special_tokens=[START],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )
