"""Final answers: found, compared, and 'the checker failed' is not 'wrong'."""

import asyncio
from decimal import Decimal

import pytest

from qedjax.grading.answers import AnswerGrader, Checker, final_answer, plain_number
from qedjax.grading.grade import Graded, Ungraded


@pytest.mark.parametrize(('text', 'want'), [
    ('2 + 2 = 4. The answer is 4.', '4'), ('So \\boxed{1} and then \\boxed{\\frac{1}{2}}.', '\\frac{1}{2}'), ('Answer: 7', '7'),
    ('#### 1,234', '1,234'), ('The answer is 3. No, the answer is 4.', '4'), ('\\boxed{unclosed', ''), ('nothing here', ''), ('', ''),
    ('the ANSWER is: $3.50.', '$3.50'), ('\\boxed{a_{1}} then \\boxed{b', 'a_{1}'), ('} \\boxed{2} {', '2'),
    ('\\boxed{\\boxed{3}}', '3'), ('#### Step 3\nwe are done', ''), ('\\boxed{' * 20_000, '')])
def test_final_answers(text, want):
    assert final_answer(text) == want


@pytest.mark.parametrize(('text', 'want'), [('4', 4), ('4.0', 4), ('1,234', 1234), ('$3.50', 3.5), ('-2', -2), ('4 apples', None),
                                            ('1/2', None), ('', None), ('1e3', None), ('٣', None), ('1,2,3', None), ('1,23', None),
                                            ('12,345,678.5', Decimal('12345678.5'))])
def test_plain_numbers(text, want):
    assert plain_number(text) == want


def test_grades():
    grader = AnswerGrader()
    grader.check({'answer': '4'})
    with pytest.raises(ValueError, match='has no answer'):
        grader.check({'answer': ' '})

    async def main():
        got = [await grader.grade({'answer': truth}, answer) for truth, answer in (
            ('4', 'The answer is 4.0.'), ('4', 'The answer is 5.'), ('4', 'who knows'), ('1/2', '\\boxed{0.5}'),
            (str(2**53), f'\\boxed{{{2**53 + 1}}}'), ('\\sqrt{2}', '\\boxed{2^{1/2}}'), ('(0,1)', '\\boxed{[0,1]}'),
            ('2', '\\boxed{banana}'))]
        await grader.close()
        return got

    assert [g.score for g in asyncio.run(main())] == [7, 0, 0, 7, 0, 7, 0, 0]


def test_a_check_that_hangs_or_dies_is_no_verdict_and_the_next_goes_on():
    checker = Checker(timeout=3.0)
    hung = checker.verify('9^{9^{9^{9}}}', '1')
    assert isinstance(hung, Ungraded)
    assert 'more than 3 s' in hung.reason
    assert checker.verify('1/2', '0.5') is True
    checker._process.kill()
    checker._process.join()
    assert checker.verify('1/2', '0.5') is True
    assert isinstance(checker.verify('\\begin{', '1'), Ungraded)  # a truth that it cannot read
    checker.close()


def test_full_marks_are_a_reward_of_one():
    assert Graded(7).reward == 1
