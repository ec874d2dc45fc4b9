// The official `openai` package for Node, unmodified, against a running cluster: run_against_cluster.py starts
// one and says where it is.

import assert from 'node:assert/strict';
import { test } from 'node:test';

import OpenAI from 'openai';

const client = new OpenAI({
  baseURL: process.env.KVRELAY_BASE_URL,
  apiKey: 'not asked for',
  maxRetries: 0,
  timeout: 300_000,
});
const model = (await client.models.list()).data[0].id;
const question = { role: 'user', content: 'Name three rivers.' };
const greedy = { model, messages: [question], max_tokens: 12, temperature: 0 };

const personSchema = {
  type: 'object',
  properties: {
    name: { type: 'string', maxLength: 12 },
    age: { type: 'integer', minimum: 0, maximum: 150 },
  },
  required: ['name', 'age'],
  additionalProperties: false,
};
const weatherSchema = {
  type: 'object',
  properties: { city: { type: 'string', maxLength: 12 }, unit: { enum: ['C', 'F'] } },
  required: ['city', 'unit'],
  additionalProperties: false,
};
const weatherTool = { type: 'function', function: { name: 'get_weather', parameters: weatherSchema } };
const oneCall = {
  ...greedy,
  messages: [{ role: 'user', content: 'What is the weather in Paris?' }],
  tools: [weatherTool],
  tool_choice: { type: 'function', function: { name: 'get_weather' } },
  max_tokens: 80,
};

function assertPerson(text) {
  const person = JSON.parse(text);
  assert.deepEqual(Object.keys(person).sort(), ['age', 'name']);
  assert.equal(typeof person.name, 'string');
  assert.ok(Number.isInteger(person.age));
}

function assertWeatherArguments(text) {
  const given = JSON.parse(text);
  assert.deepEqual(Object.keys(given).sort(), ['city', 'unit']);
  assert.ok(['C', 'F'].includes(given.unit));
}

test('models are listed and retrieved', async () => {
  assert.equal((await client.models.retrieve(model)).id, model);
});

test('a stream adds up to the answer in one piece', async () => {
  const whole = await client.chat.completions.create(greedy);
  const fields = { ...greedy, stream: true, stream_options: { include_usage: true } };
  let text = '';
  let usage = null;
  const finishReasons = [];
  for await (const chunk of await client.chat.completions.create(fields)) {
    text += chunk.choices[0]?.delta.content ?? '';
    if (chunk.choices[0]?.finish_reason) finishReasons.push(chunk.choices[0].finish_reason);
    usage = chunk.usage ?? usage;
  }
  assert.ok(text.length > 0);
  assert.equal(text, whole.choices[0].message.content);
  assert.deepEqual(finishReasons, [whole.choices[0].finish_reason]);
  assert.equal(usage.completion_tokens, 12);
  assert.equal(usage.prompt_tokens, whole.usage.prompt_tokens);
});

test("the SDK's stream helper gives the same answer", async () => {
  const whole = await client.chat.completions.create(greedy);
  const stream = client.chat.completions.stream(greedy);
  let text = '';
  stream.on('content', (delta) => (text += delta));
  const final = await stream.finalChatCompletion();
  assert.equal(text, whole.choices[0].message.content);
  assert.deepEqual(final.choices[0].message.content, whole.choices[0].message.content);
});

test('text beyond ASCII comes whole', async () => {
  const said = 'Zażółć 東京 👩🏽‍🚀 نَصٌّ';
  const fields = { ...greedy, max_tokens: 100, structured_outputs: { choice: [said] } };
  let text = '';
  for await (const chunk of await client.chat.completions.create({ ...fields, stream: true })) {
    text += chunk.choices[0]?.delta.content ?? '';
  }
  assert.equal(text, said);
});

test('a stream that is left ends, and the next request is served', async () => {
  const endless = { ...greedy, max_tokens: 4000, ignore_eos: true, stream: true };
  const stream = await client.chat.completions.create(endless);
  for await (const chunk of stream) {
    if (chunk.choices[0]?.delta.content) break;
  }
  assert.ok(stream.controller.signal.aborted);
  assert.ok((await client.chat.completions.create({ ...greedy, max_tokens: 1 })).choices.length);
});

test('runTools calls the function with arguments that fit', async () => {
  const calls = [];
  const runner = client.chat.completions.runTools({
    ...oneCall,
    tools: [
      {
        type: 'function',
        function: {
          name: 'get_weather',
          description: 'Tell the weather of a city.',
          parameters: weatherSchema,
          parse: JSON.parse,
          function: (given) => {
            calls.push(given);
            return 'sunny';
          },
        },
      },
    ],
  });
  await runner.done();
  assert.equal(calls.length, 1);
  assertWeatherArguments(JSON.stringify(calls[0]));
});

test('streamed tool calls add up, and a conversation goes on from their result', async () => {
  const whole = (await client.chat.completions.create(oneCall)).choices[0];
  assert.equal(whole.finish_reason, 'tool_calls');
  const [call] = whole.message.tool_calls;
  assertWeatherArguments(call.function.arguments);
  const final = await client.chat.completions.stream(oneCall).finalChatCompletion();
  assert.equal(final.choices[0].message.tool_calls[0].function.arguments, call.function.arguments);
  const result = { role: 'tool', tool_call_id: call.id, content: 'sunny' };
  const told = await client.chat.completions.create({
    ...oneCall,
    messages: [...oneCall.messages, whole.message, result],
    tool_choice: 'none',
    max_tokens: 8,
  });
  assert.ok(told.choices[0].message.content.length > 0);
});

test('structured output fulfils its schema', async () => {
  const format = { type: 'json_schema', json_schema: { name: 'person', schema: personSchema, strict: true } };
  const fields = { ...greedy, max_tokens: 60, response_format: format };
  const answer = await client.chat.completions.parse(fields);
  assert.equal(answer.choices[0].finish_reason, 'stop');
  assertPerson(answer.choices[0].message.content);
});

test('responses come in one piece, as events, and go on', async () => {
  const fields = { model, input: [question], max_output_tokens: 12, temperature: 0 };
  const whole = await client.responses.create(fields);
  const expected = (await client.chat.completions.create(greedy)).choices[0].message.content;
  assert.equal(whole.output_text, expected);
  let text = '';
  let last = null;
  for await (const event of await client.responses.create({ ...fields, stream: true })) {
    if (event.type === 'response.output_text.delta') text += event.delta;
    last = event;
  }
  assert.equal(text, expected);
  assert.equal(last.type, 'response.incomplete');
  const more = { role: 'user', content: 'Another one?' };
  const next = await client.responses.create({ ...fields, input: [question, ...whole.output, more] });
  assert.ok(next.usage.input_tokens > whole.usage.input_tokens);
});

test('responses call functions and fulfil schemas', async () => {
  const fields = { model, input: 'What is the weather in Paris?', max_output_tokens: 80, temperature: 0 };
  const tool = { type: 'function', name: 'get_weather', parameters: weatherSchema, strict: true };
  const choice = { type: 'function', name: 'get_weather' };
  const called = await client.responses
    .stream({ ...fields, tools: [tool], tool_choice: choice })
    .finalResponse();
  assert.equal(called.output.length, 1);
  assertWeatherArguments(called.output[0].arguments);
  const format = { type: 'json_schema', name: 'person', schema: personSchema, strict: true };
  const described = await client.responses.parse({ ...fields, input: 'Who is Bob?', text: { format } });
  assert.equal(described.status, 'completed');
  assertPerson(described.output_text);
});

test("refusals are the SDK's own errors, with the field at fault", async () => {
  const refused = (create, kind, param) =>
    assert.rejects(create, (error) => {
      assert.ok(error instanceof kind, `${error}`);
      assert.equal(error.param, param);
      return true;
    });
  const { BadRequestError, NotFoundError } = OpenAI;
  await refused(() => client.chat.completions.create({ ...greedy, model: 'nobody' }), NotFoundError, 'model');
  await refused(() => client.chat.completions.create({ ...greedy, n: 99 }), BadRequestError, 'n');
  await refused(() => client.chat.completions.create({ ...greedy, n: 99, stream: true }), BadRequestError, 'n');
  await refused(
    () => client.responses.create({ model, input: 'x', previous_response_id: 'resp_1' }),
    BadRequestError,
    'previous_response_id',
  );
});

test('a request id is given back', async () => {
  const headers = { 'x-request-id': `node-${process.pid}` };
  const answer = await client.chat.completions.create({ ...greedy, max_tokens: 1 }, { headers });
  assert.equal(answer._request_id, headers['x-request-id']);
});
