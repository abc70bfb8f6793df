"""Summarization: say it shorter, down to the subject of a mail or the topic of a report."""

from rlhf_jax.data.rows import Row
from rlhf_jax.data.tasks.flan.readers import asked, example, labelled, written
from rlhf_jax.data.tasks.task import Example, Task, Template

CLUSTER = "summarization"


def _without_backslashes(text: str) -> str:
    return text.replace("\\", " ").strip()  # they stand for line breaks


def _gigaword(row: Row) -> Example | None:
    if "UNK" in row["document"] or "UNK" in row["summary"]:  # a word that nobody knows any more
        return None
    return example({"text": row["document"]}, [row["summary"]])


def _articles(text: str) -> str:
    return text.replace("|||||", "\n\n").replace("NEWLINE_CHAR", "\n").strip()


def _debate(row: Row) -> Example | None:
    arguments = "\n".join(f"- {argument['value']}" for argument in row["_argument_sentences"])
    return example({"topic": row["_debate_name"], "arguments": arguments}, [row["_claim"]])


def _critics(row: Row) -> Example | None:
    reviews = "\n".join(f"- {critic['value']}" for critic in row["_critics"])
    return example({"film": row["_movie_name"], "reviews": reviews}, [row["_critic_consensus"]])


TASKS = (
    Task(
        name="aeslc",
        cluster=CLUSTER,
        data="aeslc",
        reader=written({"email": "email_body"}, "subject_line"),
        metric="rouge",
        held_out="test",
        templates=(
            *asked(
                "{email}\n\nWrite a subject line for this mail.",
                "What is this e-mail about? Say it in a few words, as one does in the subject line.\n\n{email}"
                "\n\nSubject:",
                "Mail: {email}\n\nSubject:",
                "The sender of this message forgot its subject. Add it.\n\n{email}\n\nSubject line:",
                "Sum the following mail up so briefly that it can be listed in an inbox.\n\n{email}\n\nIn the inbox:",
                "You have mail:\n\n{email}\n\nUnder which heading would you file it?",
                "Suggest a title for the e-mail below.\n\n{email}\n\nTitle:",
            ),
            Template('Write an e-mail with the subject "{answer}".', target="{email}"),
            Template("Subject: {answer}\nMail:", target="{email}"),
            Template('A colleague sends you a mail that is headed "{answer}". What does it say?', target="{email}"),
        ),
    ),
    Task(
        name="ag_news",
        cluster=CLUSTER,
        data="ag_news_subset",
        reader=labelled(
            {"title": "title", "text": "description"},
            ("world", "sports", "business", "science and technology"),
            clean=_without_backslashes,
        ),
        held_out="test",
        templates=(
            *asked(
                "{title}\n\n{text}\n\nWhat is this report about?{options}\n\nTopic:",
                "Headline: {title}\nReport: {text}\n\nIn which section of a paper does it belong?{options}\n\nSection:",
                "Sort the news by topic.{options}\n\n{title}: {text}\n\nTopic:",
                '{text}\n\nThis appeared under the title "{title}". Which subject is it?{options}\n\nSubject:',
                "A reader follows one of these topics. Which of them must it be if this is of interest?"
                "\n\n{title}\n{text}"
                "{options}\n\nTopic:",
                "Tag this article.\n\nTitle: {title}\nText: {text}{options}\n\nTag:",
                "Summarize in one label: {title}. {text}{options}\n\nLabel:",
            ),
            Template("Write a headline for the section of a newspaper called: {answer}.", target="{title}"),
            Template("Section: {answer}\nHeadline: {title}\nReport:", target="{text}"),
            Template("Write a short report for the {answer} page of a newspaper.", target="{text}"),
        ),
    ),
    Task(
        name="cnn_dailymail",
        cluster=CLUSTER,
        data="cnn_dailymail",
        reader=written({"article": "article"}, "highlights"),
        metric="rouge",
        held_out="test",
        templates=(
            *asked(
                "{article}\n\nList the main points of this article.",
                "Write highlights for the article below, a line for each.\n\n{article}\n\nHighlights:",
                "Article: {article}\n\nWhat matters most in it, in a few sentences?",
                "A reader has half a minute. Tell them what is in this article.\n\n{article}\n\nIn short:",
                "Summarize the news story.\n\n{article}\n\nSummary:",
                "Boil this report down to its key facts.\n\n{article}\n\nKey facts:",
                "News story:\n{article}\n\nThe bullet points next to the story said:",
                "For a newsletter, reduce this report to the essential.\n\n{article}\n\nNewsletter:",
            ),
            Template("Key points: {answer}\n\nWrite the article that they are taken from.", target="{article}"),
            Template("Write a news story with these highlights.\n\n{answer}\n\nStory:", target="{article}"),
        ),
    ),
    Task(
        name="gigaword",
        cluster=CLUSTER,
        data="gigaword",
        reader=_gigaword,
        metric="rouge",
        held_out="test",
        templates=(
            *asked(
                "{text}\n\nGive this a headline.",
                "First sentence of a report: {text}\n\nHeadline of the report:",
                "Shorten this to a headline: {text}",
                "Which headline would go with the following? {text}",
                "Write a title of a few words for: {text}\n\nTitle:",
                "Text: {text}\nGist:",
                "In as few words as possible, what happened? {text}",
            ),
            Template("Headline: {answer}\nFirst sentence of the report:", target="{text}"),
            Template('Write the opening of a news report that is headed "{answer}".', target="{text}"),
            Template("Say this more fully, as a news agency would: {answer}", target="{text}"),
        ),
    ),
    Task(
        name="multi_news",
        cluster=CLUSTER,
        data="multi_news",
        reader=written({"articles": "document"}, "summary", clean=_articles),
        metric="rouge",
        held_out="test",
        templates=(
            *asked(
                "{articles}\n\nSummarize these articles in one text.",
                "Several papers wrote about the same event.\n\n{articles}\n\nWhat do they report, taken together?",
                "Write a digest of the following coverage.\n\n{articles}\n\nDigest:",
                "Sources:\n\n{articles}\n\nSummary of all sources:",
                "Read what was published and give a single account of it.\n\n{articles}\n\nAccount:",
                "Combine the reports below into a summary of a paragraph or two.\n\n{articles}\n\nSummary:",
                "{articles}\n\nSomebody who has read none of this asks you what it is all about. You say:",
                "Write what an editor would, who has all of this on the desk and room for a short piece."
                "\n\n{articles}\n\nPiece:",
                "What is new, and what do the sources say about it?\n\n{articles}\n\nOverview:",
            ),
            Template(
                "Here is a digest of what several papers wrote. {answer}\n\nWhat may the papers have written?",
                target="{articles}",
            ),
        ),
    ),
    Task(
        name="newsroom",
        cluster=CLUSTER,
        data="newsroom",
        reader=written({"title": "title", "text": "text"}, "summary"),
        metric="rouge",
        held_out="test",
        templates=(
            *asked(
                "{title}\n\n{text}\n\nWrite the teaser that stands below the title.",
                "Title: {title}\nArticle: {text}\n\nSummary:",
                'Summarize the article "{title}" in a sentence or two.\n\n{text}\n\nIn a sentence or two:',
                "How would you describe this page to somebody who might want to read it?\n\n{title}\n{text}"
                "\n\nDescription:",
                "{text}\n\nThe above appeared as: {title}\nIn brief:",
                "A newspaper's site shows a line or two about each article. Write them for this one.\n\n{title}"
                "\n\n{text}"
                "\n\nLine:",
                'What does the author of "{title}" say? The text follows.\n\n{text}\n\nTold briefly:',
                "Recommend this article with its main point.\n\nTitle: {title}\n\n{text}\n\nMain point:",
            ),
            Template("Teaser: {answer}\n\nWhat is the title of the article?", target="{title}"),
            Template("Title: {title}\nSummary: {answer}\nArticle:", target="{text}"),
        ),
    ),
    Task(
        name="opinion_idebate",
        cluster=CLUSTER,
        data="opinion_abstracts/idebate",
        reader=_debate,
        metric="rouge",
        train="train[:80%]",  # all of its rows are in the one split "train"
        held_out="train[80%:]",
        templates=(
            *asked(
                "{topic}\n\nArguments:\n{arguments}\n\nWhat claim do they support?",
                "People debate: {topic}\nOne of them says:\n{arguments}\nSum this up in one claim.",
                "Debate: {topic}\n{arguments}\n\nThe point that is made:",
                "What is the speaker getting at?\n\nSubject of the debate: {topic}\nThe speech:\n{arguments}\n\nIn a"
                " sentence:",
                'In a debate on "{topic}" the following is said. State the claim behind it.\n\n{arguments}\n\nClaim:',
                "{arguments}\n\nFor a summary of the debate ({topic}), these arguments become one line:",
                "Condense the reasoning.\n\nMotion: {topic}\nReasons:\n{arguments}\n\nCondensed:",
                "Minutes of a debate on {topic}. For each speech there is one line.\n\nSpeech:\n{arguments}"
                "\n\nOne line:",
            ),
            Template("Debate: {topic}\nClaim: {answer}\nGive arguments for the claim.", target="{arguments}"),
            Template(
                'Somebody claims "{answer}" and argues like this:\n{arguments}\n\nWhat is being debated?',
                target="{topic}",
            ),
        ),
    ),
    Task(
        name="opinion_movies",
        cluster=CLUSTER,
        data="opinion_abstracts/rotten_tomatoes",
        reader=_critics,
        metric="rouge",
        train="train[:80%]",  # all of its rows are in the one split "train"
        held_out="train[80%:]",
        templates=(
            *asked(
                "Critics on {film}:\n{reviews}\n\nWhat do they agree on?",
                "{reviews}\n\nThese are reviews of {film}. Write the consensus in a sentence.",
                "Film: {film}\nReviews:\n{reviews}\n\nConsensus:",
                "Sum up what the critics think of {film}.\n\n{reviews}\n\nSummed up:",
                'A friend asks if "{film}" is worth seeing. Tell them the general opinion.\n\n{reviews}'
                "\n\nGeneral opinion:",
                'From the quotations below, write one line on "{film}" for a page about films.\n\n{reviews}\n\nLine:',
                "What was the reception of {film}?\n\nThe critics:\n{reviews}\n\nThe reception:",
                "Opinions differ, but what do most say about {film}?\n\nOpinions:\n{reviews}\n\nMost say:",
            ),
            Template("The critics' consensus on {film}: {answer}\n\nQuote some of the reviews.", target="{reviews}"),
            Template(
                "{reviews}\n\nOn the whole: {answer}\n\nWhich film is this about?",
                target="{film}",
            ),
        ),
    ),
    Task(
        name="samsum",
        cluster=CLUSTER,
        data="samsum",
        reader=written({"dialogue": "dialogue"}, "summary"),
        metric="rouge",
        held_out="test",
        templates=(
            *asked(
                "{dialogue}\n\nWhat did they talk about?",
                "Chat:\n{dialogue}\n\nSummary of the chat:",
                "Sum up this conversation for somebody who missed it.\n\n{dialogue}\n\nSummed up:",
                "Retell the following messages in a sentence or two.\n\n{dialogue}\n\nRetold:",
                "Read the dialogue and report what was said or agreed.\n\n{dialogue}\n\nReport:",
                "{dialogue}\n\nIn brief, this is what happens in the conversation:",
                "Minutes of a chat. Be short.\n\n{dialogue}\n\nMinutes:",
            ),
            Template("Write a chat in which this happens: {answer}", target="{dialogue}"),
            Template("{answer}\n\nHow may the conversation have gone, message by message?", target="{dialogue}"),
            Template("Summary: {answer}\nDialogue:\n", target="{dialogue}"),
        ),
    ),
    Task(
        name="wiki_lingua",
        cluster=CLUSTER,
        data="gem/wiki_lingua_english_en",
        reader=written({"guide": "source"}, "target", others="references"),
        metric="rouge",
        held_out="test",
        templates=(
            *asked(
                "{guide}\n\nGive the steps of this guide in brief.",
                "Instructions: {guide}\n\nSummary of the instructions:",
                "Somebody has no time to read all this. List what they have to do.\n\n{guide}\n\nTo do:",
                "Shorten the following how-to text to a sentence for each step.\n\n{guide}\n\nShortened:",
                "What does this guide advise?\n\n{guide}\n\nAdvice in short:",
                "Write the outline of the explanation below.\n\n{guide}\n\nOutline:",
                "{guide}\n\nSo, in a nutshell, one should do this:",
                "Make a checklist of this article.\n\n{guide}\n\nChecklist:",
            ),
            Template("Steps: {answer}\n\nExplain them in detail.", target="{guide}"),
            Template("Outline of a guide: {answer}\n\nWrite the guide.", target="{guide}"),
        ),
    ),
    Task(
        name="xsum",
        cluster=CLUSTER,
        data="xsum",
        reader=written({"article": "document"}, "summary"),
        metric="rouge",
        held_out="test",
        templates=(
            *asked(
                "{article}\n\nSummarize this in a single sentence.",
                "Article: {article}\n\nThe one sentence with which it is introduced:",
                "What is the news here?\n\n{article}\n\nThe news:",
                "Write one sentence that tells what the article below is about.\n\n{article}\n\nSentence:",
                "If you could keep just a sentence of what this report says, what would it be?\n\n{article}\n\nKeep:",
                "{article}\n\nTo put it in one sentence:",
                "A newsreader announces this story with one sentence. Which?\n\nStory: {article}\n\nAnnouncement:",
            ),
            Template("{answer}\n\nWrite the full report.", target="{article}"),
            Template("Introduction: {answer}\nThe article goes on like this:", target="{article}"),
            Template("Expand this sentence into a news article. {answer}", target="{article}"),
        ),
    ),
)
