"""Sentiment: does somebody like it?"""

from rlhf_jax.data.rows import Row
from rlhf_jax.data.tasks.flan.readers import asked, example, labelled
from rlhf_jax.data.tasks.task import Example, Task, Template

CLUSTER = "sentiment"
_OPTIONS = ("negative", "positive")


def _sentiment140(row: Row) -> Example | None:
    label = {0: "negative", 4: "positive"}.get(row["polarity"])  # 2 is neutral: in the test rows alone
    return example({"tweet": row["text"]}, [label or ""], _OPTIONS)


def _without_markup(text: str) -> str:
    return text.replace("<br />", "\n").strip()


def _without_escapes(text: str) -> str:
    return text.replace("\\n", "\n").replace('\\"', '"').strip()


TASKS = (
    Task(
        name="imdb",
        cluster=CLUSTER,
        data="imdb_reviews/plain_text",
        reader=labelled({"review": "text"}, _OPTIONS, clean=_without_markup),
        held_out="test",
        templates=(
            *asked(
                "{review}\n\nIs this review of a film positive or negative?{options}\n\nAnswer:",
                "Film review: {review}\n\nSentiment of the review?{options}\n\nSentiment:",
                "Somebody saw a film and wrote the following. What did they think of it?\n\n{review}{options}"
                "\n\nOpinion:",
                "Read the review and tell the critic's attitude.\n\n{review}{options}\n\nAttitude:",
                "{review}\n\nHow would you label this review?{options}\n\nLabel:",
                "Did the person who wrote this enjoy the film? Say positive if so, negative if not."
                "\n\n{review}{options}"
                "\n\nAnswer:",
                "What is the tone of the text about a film below?{options}\n\nText: {review}\n\nTone:",
            ),
            Template("Write a {answer} review of a film.", target="{review}"),
            Template("You have seen a film, and your impression is {answer}. Tell others about it.", target="{review}"),
            Template("Sentiment: {answer}\nFilm review:", target="{review}"),
        ),
    ),
    Task(
        name="sentiment140",
        cluster=CLUSTER,
        data="sentiment140",
        reader=_sentiment140,
        held_out="test",
        templates=(
            *asked(
                "{tweet}\n\nWhat feeling does this tweet express?{options}\n\nFeeling:",
                "Tweet: {tweet}\n\nClassify its sentiment.{options}\n\nSentiment:",
                'Is the author of this tweet in good spirits (positive) or not (negative)? "{tweet}"{options}'
                "\n\nAnswer:",
                "A short message was posted: {tweet}\n\nIts mood is best called which of these?{options}\n\nMood:",
                "Judge the tweet.{options}\n\n{tweet}\n\nJudgement:",
                "{tweet}\n\nDoes that sound positive or negative?{options}\n\nIt sounds",
                "Sort these posts by mood.{options}\n\nPost: {tweet}\nMood:",
            ),
            Template("Write a tweet whose mood is {answer}.", target="{tweet}"),
            Template("What might somebody post who feels {answer} about something?", target="{tweet}"),
            Template("Mood: {answer}\nTweet:", target="{tweet}"),
        ),
    ),
    Task(
        name="sst2",
        cluster=CLUSTER,
        data="glue/sst2",
        reader=labelled({"sentence": "sentence"}, _OPTIONS),
        templates=(
            *asked(
                'A critic writes: "{sentence}" Is that praise (positive) or blame (negative)?{options}\n\nAnswer:',
                "{sentence}\n\nWhat is the sentiment of this line from a review?{options}\n\nSentiment:",
                "Line: {sentence}\n\nDoes it speak for the film or against it?{options}\n\nAnswer:",
                "How does the following sentence talk about a film?{options}\n\nSentence: {sentence}\nAnswer:",
                "Tag the phrase.{options}\n\nPhrase: {sentence}\nTag:",
                'Would a director be glad to read "{sentence}"? If glad, answer positive.{options}\n\nAnswer:',
                "Given this excerpt, guess the critic's opinion.\n\n{sentence}{options}\n\nThe opinion is",
                "{sentence}\n\nIf that were all you knew of a film, would you think well of it?{options}"
                "\n\nMy impression is",
            ),
            Template("Write a sentence from a {answer} film review.", target="{sentence}"),
            Template("Express a {answer} opinion of a film in a few words.", target="{sentence}"),
        ),
    ),
    Task(
        name="yelp",
        cluster=CLUSTER,
        data="yelp_polarity_reviews",
        reader=labelled({"review": "text"}, _OPTIONS, clean=_without_escapes),
        held_out="test",
        templates=(
            *asked(
                "{review}\n\nIs this customer satisfied (positive) or not (negative)?{options}\n\nAnswer:",
                "A review of a business: {review}\n\nWhat is its sentiment?{options}\n\nSentiment:",
                "Would the writer of this review come again? If so, it is positive.\n\n{review}{options}\n\nIt is",
                "Customer feedback:\n{review}\n\nFile it under one of these.{options}\n\nFile under:",
                "The owner of a shop wants to know if a review is good or bad news.\n\n{review}{options}\n\nThe review"
                " is",
                "Experience: {review}\n\nOverall impression?{options}\n\nImpression:",
                "Tell me in one word how this went.{options}\n\n{review}\n\nIn one word:",
            ),
            Template("Write a {answer} review of a restaurant, a shop or another business.", target="{review}"),
            Template("Rating: {answer}\nWhat the customer wrote:", target="{review}"),
            Template(
                "You were a customer somewhere, with {answer} impressions. Describe your visit.", target="{review}"
            ),
        ),
    ),
)
