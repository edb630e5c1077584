"""Which encoding a text is in that is not UTF-8: that by which most of its characters are among the commonest of those who write in it."""

import codecs
import re
import shlex
from pathlib import Path

ENDS = "，。、：；？！"
CHINESE = (  # the commonest characters; of running text they are half
    "的一是不了在人有我他这个们中来上大为和国地到以说时要就出会可也你对生能而子那得于着下自之年过发后作里用道行所然家种事成方多经么去法学如都同现当没动面起看定天分还进好小部其些主样理心本前开但因只从想实日军者意无力它与长把机十民第公此已工使情明性知全三又关点正业外"
    "将两高间由问很最重并物手应战向头文体政美相见被利什二等产或新己制身果加西斯月话合回特代内信表化老给世位次度门任常先海通教儿原东声提立及比员解水名真论处走义各入几口认条平系气题活尔更别打女变四神总何电数安少报才结反受目太量再感建务做接必" + ENDS)
TRADITIONAL = "的一是不了在人有我他這個們中來上大為和國地到以說時要就出會可也你對生能而子那得於著下自之年過發後作裡用道行所然家種事成方多經麼去法學如都同現當沒動" + ENDS
KANA = "のにはをたがでてとしれさいうかくこすそなまもらりるんっアイウエオカキクコサシスセタチツテトナニハフマミムメモラリルレロンー" + ENDS
HANGUL = "이다는을의가에은고하로지도사기한를서자시리어대그나인과아라해일정수있부장전들으보주구게까"
RUSSIAN, GREEK = "оеаинтсрвлкмдпу", "αοιετσνηυρπκμλό"
WESTERN = "éèàùâêîôûçëïöüäßñáíóúåæøãõìòœÉÈÀÇÖÜÄÅØÆÑ’‘“”–—…«»¿¡°§£€"
CENTRAL = "ąćęłńóśźżěščřžýáíéůúďťňőűöüĄĆĘŁŃÓŚŹŻĚŠČŘŽÝŮ"

# By iconv's and Python's name: those letters, and the least share of what is no ASCII that they must be. Of a script of thousands few suffice.
ENCODINGS = {
    "GBK": (CHINESE, 0.1), "GB18030": (CHINESE, 0.1), "BIG5": (TRADITIONAL, 0.1), "SHIFT_JIS": (KANA, 0.2), "EUC-JP": (KANA, 0.2), "EUC-KR": (HANGUL, 0.2),
    "WINDOWS-1251": (RUSSIAN, 0.6), "KOI8-R": (RUSSIAN, 0.6), "ISO-8859-7": (GREEK, 0.6)}
AMONG_ASCII = {"ISO-8859-1": (WESTERN, 0.8), "WINDOWS-1252": (WESTERN, 0.8), "ISO-8859-2": (CENTRAL, 0.8), "WINDOWS-1250": (CENTRAL, 0.8)}
ASCII = "\t\n\r" + "".join(map(chr, range(32, 127)))
EVERYTHING = ASCII + CHINESE + TRADITIONAL + KANA + HANGUL + RUSSIAN + GREEK + WESTERN + CENTRAL
WITH_ZEROS = dict.fromkeys(("UTF-16LE", "UTF-16BE", "UTF-32LE", "UTF-32BE"), (EVERYTHING, 0.3))


def not_utf8(content: bytes, at: int, path: Path) -> str:
    """What the file is, if at byte `at` it is not UTF-8 text, and the line that makes a text of it."""
    start = max(content.rfind(b"\n", 0, at) + 1, at - 2**12)
    readable = content[start:at + 2**15].decode(errors="replace")
    source, target = shlex.quote(str(path)), shlex.quote(f"{path.stem}-utf8{path.suffix}")
    byte = f"byte {at} is 0x{content[at]:02x}"
    if content[at] and 2 * readable.count("\N{REPLACEMENT CHARACTER}") < sum(not letter.isascii() for letter in readable) / 2:
        return f"UTF-8 text, but damaged ({byte}); to leave out what is no character: iconv -c -f UTF-8 -t UTF-8 {source} > {target}"
    found = likely_encoding(content[:2**15]) or likely_encoding(content[start:at + 2**15])
    if found:
        return f"not UTF-8 text ({byte}) but, it seems, {found}; to convert it: iconv -f {found} -t UTF-8 {source} > {target}"
    if b"\0" in content:
        return f"a binary file (byte {content.index(0)} is zero), not UTF-8 text"
    return f"not UTF-8 text ({byte}); convert it to UTF-8 first"


def likely_encoding(sample: bytes) -> str | None:
    for mark, encoding in ((codecs.BOM_UTF32_LE, "UTF-32"), (codecs.BOM_UTF32_BE, "UTF-32"), (codecs.BOM_UTF16_LE, "UTF-16"), (codecs.BOM_UTF16_BE, "UTF-16")):
        if sample.startswith(mark):
            return encoding                                   # the mark also says in which order bytes come
    runs = re.findall(rb"[\x80-\xff]+", sample)
    alone = sum(map(len, runs)) < 2 * len(runs)               # é among ASCII letters; other scripts write with nothing else
    shares = {}
    for encoding, (letters, least) in (WITH_ZEROS if b"\0" in sample else AMONG_ASCII if alone else ENCODINGS).items():
        try:
            decoded = codecs.getincrementaldecoder(encoding)().decode(sample)        # the sample may end inside a character
        except UnicodeDecodeError:
            continue
        telling = [letter for letter in decoded if b"\0" in sample or not letter.isascii()]
        share = sum(letter in letters for letter in telling) / max(1, len(telling))
        if share >= least:
            shares[encoding] = share
    return max(shares, key=shares.get, default=None)
