"""Answers and what they are worth, each row worked out by reading it: (ground truth, right answers, wrong answers), split at |."""

ANSWERS = [
    (  # scaled: none of these is the bare number
        "5",
        "5 kilos|5 milk bottles|5 mills of grain?|5 balls|5b|5 t|5 tickets|5 trees|5 Men|5 Balls|5 Trees|5 Muffins|5 Miles|5 Kings"
        "|5 thirsty dogs|5 halfway houses|5 tents|5 tenants|5 grosses?|5 points|5 pointers|5 and that is it|5 apples and a bowl|5 & that is all|5 dogs plus cats",
        "5 mill|5 MM|5 mio|5 bln|5 trn|5\u2010million|5\u2011million|5\u2014million"
        "|5\u2009million|5\u3000million|5\u2003billion|5*million|**5**M|__5__ thousand|5 ~million|5.0 million|5. million|5,million?|5 Million"
        "|5 billions|5 trillions|5 quadrillion|5 quintillion|5 lac|5 crores|5 gross|5 tens|5-thousand dollars|$5 mil|$5bn|\u20ac5 mio|5k dollars|5 K"
        "|5 & a half|5 and one-half|5 + a half|5+half|5-and-a-half|5 apples and a half|5 dollars and fifty cents"
        "|5 feet and ten inches|5 and twenty|5-tenths|5 point five|5 point two|5 Point Five|5 a hundred|5\u5343|5e6|5 x 10^6|5 \u00d7 10\u2076",
    ),
    (  # signs
        "-5",
        "\u2212 5|\uff0d5|\u221205|\u22125 degrees|**-5**|-**5**|\u2212\u20ac5|\u2212\uff15|-\uff15",
        "+5|\u2212+5|\u22125M|\u22125 and a half|\uff0b5|5\u2212|minus 5|negative 5|\u22120.5",
    ),
    (  # digits, spaces, currencies and bold marks
        "1234",
        "\uff11\uff12\uff13\uff14|\uff11,\uff12\uff13\uff14|\uff11\uff0c\uff12\uff13\uff14|\uff11\uff12\uff13\uff14\uff0e\uff10|\uff0b\uff11\uff12\uff13\uff14|1\uff12\uff134|\u00a01234|\u202f1234|\u20071234|\u20091234|\u30001234|1234\u00a0"
        "|1234\u00a0dollars|$\u00a01234|1\u00a0234|1\u202f234|1\u2009234|1\u00a0234.00|\u00a31,234|\u00a51,234|\u20b91,234|\u20bd1234|\u20a91234|\u20aa1234|\u20ab1234|\u20ba1234|\u20b41234|\u20a61234|\u20b11234|\u0e3f1234|\u20bf1234|\uff041234|\uffe51234"
        "|\uffe11234|US$1,234|US$ 1234|A$1234|C$1234|CA$1234|HK$1234|R$1234|USD 1234|USD1234|EUR 1,234|GBP 1234|INR 1234|Rs. 1234|Rs 1234|CHF 1234|1234 USD|1234\u20ac|1234 \u20ac|1,234\u00a0\u20ac|1234\u20b9|**1234**|**1,234**|** 1234 **"
        "|**$1,234**|$**1234**|**1234** dollars|**1234.**|**1234**.|__1234__|__$1,234__|**+1234**|\uff11\uff12\uff13\uff14\u5186",
        "\uff11\uff12\uff13|\uff11\uff12\uff13\uff14\uff15|1\u00a0234\u00a05|1\u00a02\u00a034|12\u00a034|1 234|1\u200b234|1'234|1.234|\u20b91234M|US$1234k|**1234** or **1235**|**12**34|**1**234|$$1234|XYZ 1234|1234**2**"
        "|\u0661\u0662\u0663\u0664|\uff03\uff03 1234|1234\u00bd|1234\u2153|1\u00a0234,5|\u00a01\u00a0234\u202f567|USDT 1234",
    ),
]
