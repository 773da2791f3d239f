"""Chat templates that loop for ever, eat memory or break what they can, by what each does."""

LOOP = "{% for i in range(100000) %}{% for j in range(100000) %}"
END = "{% endfor %}{% endfor %}"


def _times(start: str, step: str, end: str = "{{ ns.x }}") -> str:
    set_ = f"{{% set ns = namespace(x={start}) %}}"
    return set_ + f"{{% for i in range(60) %}}{{% set ns.x = {step} %}}{{% endfor %}}{end}"


def _often(value: str) -> str:
    """So often that its size tells, and not so often that the turns do."""
    return "{% for i in range(1000) %}{% set z = " + value + " %}{% endfor %}"


GROW = {
    "a repeated text": "{{ 'a' * 10**10 }}",
    "a repeated list": "{{ [0] * 10**10 }}",
    "a doubled text": _times("'a'", "ns.x ~ ns.x"),
    "a text added to itself": _times("'a'", "ns.x + ns.x"),
    "a list added to itself": _times("[1]", "ns.x + ns.x"),
    "lists of lists, printed": _times("[1]", "[ns.x, ns.x]"),
    "mappings of mappings as JSON": _times("[1]", "{'a': ns.x, 'b': ns.x}", "{{ ns.x|tojson }}"),
    "dict() of dict()": _times("{}", "dict(a=ns.x, b=ns.x)"),
    "tuples of tuples as a key": _times("(1,)", "(ns.x, ns.x)", "{{ {}[ns.x] }}"),
    "lists of lists, compared": _times("[1]", "[ns.x, ns.x]", "{{ ns.x == [ns.x] }}"),
    "batches of batches": _times("[1]", "(ns.x + ns.x)|batch(2)|list"),
    "a tuple 100,000 deep": "{% set ns = namespace(x=(1,)) %}{% for i in range(100000) %}{% set ns.x = (ns.x,) %}"
                            "{% endfor %}{{ {}[ns.x] }}",
    "a large power": "{{ 7 ** (7 ** (7 ** 7)) }}",
    "squares of squares": _times("3", "ns.x * ns.x"),
    "an integer of 4 million bits": "{{ ('f' * 1000000)|int(base=16) // 3 }}",
    "to_bytes": "{{ (1).to_bytes(10**10, 'big') }}",
    "%d of a width": "{{ '%10000000000d' % 1 }}",
    "%*d": "{{ '%*d' % (10**9, 1) }}",
    "%f of a precision": "{{ '%.1000000000f' % 1.0 }}",
    "% with a name of parentheses": "{{ '%((x))9999999999d' % {'(x)': 1} }}",
    "the filter format": "{{ '%10000000000d'|format(1) }}",
    "format": "{{ '{:>10000000000}'.format(1) }}",
    "format with a width among the values": "{{ '{0:{1}}'.format(1, 10**9) }}",
    "format_map": "{{ '{a:>10000000000}'.format_map({'a': 1}) }}",
    "format of many fields": "{% set x = 'a' * 100000 %}{{ ('{0}' * 100000).format(x) }}",
    "center": "{{ 'a'.center(10**10) }}", "the filter center": "{{ 'a'|center(10**10) }}",
    "ljust": "{{ 'a'.ljust(10**10) }}", "zfill": "{{ '1'.zfill(10**10) }}",
    "expandtabs": "{{ '\\t'.expandtabs(10**9) }}",
    "replace": "{% set x = 'a' * 100000 %}{{ x.replace('a', x) }}",
    "the filter replace": "{% set x = 'a' * 100000 %}{{ x|replace('a', x) }}",
    "replace of nothing": "{% set x = 'a' * 100000 %}{{ x.replace('', x) }}",
    "join": "{% set x = 'a' * 100000 %}{{ x.join(range(10000)|map('string')) }}",
    "the filter join": "{% set x = 'a' * 100000 %}{{ range(10000)|join(x) }}",
    "join of one text": "{% set x = 'a' * 100000 %}{{ ([x] * 100000)|join }}",
    "join of what is made item by item": "{% set x = 'a' * 1000 %}{{ ''.join(range(100000)|map('replace', '', x)) }}",
    "translate": "{% set x = 'a' * 100000 %}{{ x.translate({97: x}) }}",
    "indent": "{% set x = '\\n' * 100000 %}{{ x|indent(100000, blank=true) }}",
    "tojson with an indent": "{{ [[[1]] * 1000]|tojson(indent=10**9) }}",
    "round": "{{ 1.5|round(10**10, 'ceil') }}",
    "batch": "{{ [1]|batch(10**10, 0)|list }}", "slice": "{{ [1]|slice(10**10, 0)|list }}",
    "sum of lists": "{{ range(100000)|map('string')|map('list')|sum(start=[]) }}",
    "lipsum": "{{ lipsum(n=10**9) }}", "lipsum of long paragraphs": "{{ lipsum(n=1, min=10**8, max=10**9) }}",
    "wordwrap": "{{ ('a ' * 100000)|wordwrap(1, true, 'x' * 1000) }}",
    "striptags": "{{ ('<!---->' * 100000)|striptags }}",
    "urlize": "{{ ('(' * 100000 ~ 'http://a.b' ~ ')' * 100000)|urlize }}",
    "xmlattr": "{{ {'a': 'b' * 1000000}|xmlattr }}",
    "a constant of autoescape": "{% autoescape ('a'|center(10**10)) %}{% endautoescape %}{{ 'a'|center(10**10) }}",
    "a block that is set": "{% set x %}" + LOOP + "text" + END + "{% endset %}",
    "a text written often": "{% set x = 'a' * 100000 %}{% for i in range(6) %}{{ x }}{% endfor %}",
    "output": LOOP + "some text" + END,
    "a long text in a loop": LOOP + "x" * 10000 + END,
}

LOOPS = {
    "nested loops": LOOP + END,
    "nested loops that assign": LOOP + "{% set x = i %}" + END,
    "nested loops with a condition": "{% for i in range(100000) %}{% for j in range(100000) if false %}" + END,
    "macros that call themselves twice": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}"
                                         "{% endmacro %}{{ m(60) }}",
    "comparing long texts": "{% set x = 'a' * 100000 %}{% set y = 'a' * 99999 ~ 'b' %}" + _often("x == y"),
    "searching in a long text": "{% set x = 'a' * 100000 %}" + _often("'aab' in x"),
    "searching in a list": "{% set x = ('ab' * 1000)|list %}{% set y = 'c' %}" + _often("y in x"),
    "searching in what is made item by item": _often("1 in range(1000, 2000)|map('int')"),
    "testing against a list": "{% set x = ('ab' * 1000)|list %}" + _often("'c' is in x"),
    "testing long texts": "{% set x = 'a' * 100000 %}" + _often("x is upper"),
    "looking up long keys": "{% set t = (1,) * 1000 %}" + _often("{1: 2}[t]"),
    "keys that are long": "{% set t = (1,) * 1000 %}" + _often("{t: 1}"),
    "looking up with get": "{% set t = (1,) * 1000 %}" + _often("{1: 2}.get(t)"),
    "splitting": "{% set x = 'a' * 100000 %}" + _often("x.split('b')"),
    "slicing": "{% set x = 'a' * 100000 %}" + _often("x[1:]"),
    "reversing": "{% set x = 'a' * 100000 %}" + _often("x|reverse"),
    "making lists": "{% set a = 1 %}" + _often("[" + "a," * 1000 + "]"),
    "sorting": "{% set x = range(1000)|list %}" + _often("x|sort"),
    "joining texts": "{% set x = 'a' * 10000 %}" + _often("x ~ 1"),
    "capitals": "{% set x = 'a' * 10000 %}" + _often("x|upper"),
    "printing lists": "{% set x = [1] * 1000 %}{% set y %}{% for i in range(1000) %}{{ x }}{% endfor %}{% endset %}",
    "formatting": "{% set x = 'a' * 10000 %}" + _often("'%s' % x"),
    "times of day": _often("strftime_now('%c' * 100)"),
    "chains of filters": _often("range(1000)|map('string')|map('upper')|list|length"),
    "what is not there": "{{ range(30000)|map(attribute='a')|list|length }}",
    "nested loops over one range": "{% set r = range(100000) %}{% for i in r %}{% for j in r %}" + END,
    "many attributes": "{% set x = {'a': 1} %}" + _often("x.a and " * 100 + "1"),
    "a condition of a loop": "{% for j in range(100000) if j < 0 %}{% endfor %}",
    "a long text that is set": "{% set x %}{% for i in range(400) %}" + "x" * 10000 + "{% endfor %}{% endset %}",
    "namespaces of namespaces": _times("1", "namespace(a=ns.x, b=ns.x)", "{{ ns.x }}" + LOOP + END),
    "searching from the right": "{% set x = 'a' * 1000000 %}{% set y = 'ab' ~ 'a' * 500000 %}{{ x.rfind(y) }}",
    "splitting from the right": "{% set x = 'a' * 1000000 %}{% set y = 'ab' ~ 'a' * 500000 %}{{ x.rsplit(y) }}",
    "stripping many characters": "{% set x = 'a' * 1000000 %}{% set y = 'b' * 500000 ~ 'a' %}{{ x.strip(y) }}",
    "keeping what is made": "{% set ns = namespace(l=[]) %}{% for i in range(100000) %}"
                            "{% set ns.l = ns.l + ['x' * 1000 ~ i] %}{% endfor %}",
}

# What is wrong with it -> the template, and what the error says.
FAULTS = {
    "division by zero": ("{{ 1 / 0 }}", "ZeroDivisionError"),
    "a macro without end": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
    "a loop without end": ("{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}", "RecursionError"),
    "a block without end": ("{% block a %}{{ self.a() }}{% endblock %}", "RecursionError"),
    "break outside a loop": ("{% break %}", "'break' outside loop"),
    "continue outside a loop": ("{% if true %}{% continue %}{% endif %}", "'continue' not properly in loop"),
    "an unknown filter": ("{{ messages|nope }}", "nope"),
    "an unknown test": ("{{ messages is nope }}", "nope"),
    "an unknown tag": ("{% nope %}", "nope"),
    "a file": ("{% include '/etc/passwd' %}", "no loader"),
    "a syntax error": ("{{ 'a", "unexpected char"),
    "parentheses without end": ("{{ " + "(" * 20000, "RecursionError"),
    "conditions without end": ("{% if 1 %}" * 5000, "RecursionError"),
    "thirty nested loops": ("{% for a in messages %}" * 30 + "{% endfor %}" * 30, "too many statically nested blocks"),
    "an integer of 100,000 digits": ("{{ " + "9" * 100000 + " }}", "digits"),
    "too long a template": ("x" * 200000, "at most 131072 characters; got 200000"),
    "a raised list": ("{{ raise_exception([1]) }}", r"\[1\]"),
    "Python's insides": ("{{ ''.__class__.__mro__ }}", "unsafe"),
    "Python's insides through format": ("{{ '{0.__class__.__mro__}'.format('') }}", "unsafe"),
    "Python's insides through map": ("{{ ['']|map(attribute='__class__.__mro__')|list }}", "unsafe"),
    "a change of what it is given": ("{{ messages.append(1) }}", "unsafe"),
    "a change of its own list": ("{% set x = [] %}{{ x.append(1) }}", "unsafe"),
    "a namespace's insides": ("{% set ns = namespace(_x=1) %}", "must not start with _"),
    "lists 200 deep": (_times("1", "[[[[ns.x]]]]"), "nested at most 100 deep"),
    "JSON of what is none": ("{{ namespace()|tojson }}", "TypeError"),
    "a date that is no text": ("{{ strftime_now(1) }}", "TypeError"),
    "an encoding of bytes by search": ("{{ ('ä' * 1000).encode('punycode') }}", "an encoding must be one of ascii, "),
    "a range of numbers with one hash": ("{% set p = 2305843009213693951 %}{{ {}.fromkeys(range(0, p * 9, p)) }}",
                                         "a range must be of numbers below 1152921504606846976"),
}
