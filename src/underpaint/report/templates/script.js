(function () {
  // what was opened and chosen is kept when a page of a run that goes on loads itself again
  var state = history.state || {}, touched = 0;
  var keep = function (name, value) {
    state[name] = value;
    touched = Date.now();
    try { history.replaceState(state, ''); } catch (error) { /* kept until the next time only */ }
  };
  document.querySelectorAll('details').forEach(function (details, index) {
    if (state['details' + index]) { details.open = true; }
    details.addEventListener('toggle', function () { keep('details' + index, details.open); });
  });

  var section = document.getElementById('pictures');
  var slider = section && section.querySelector('.slider');
  if (slider) {
    var input = slider.querySelector('input'), output = slider.querySelector('output');
    var frames = Array.from(section.querySelectorAll('.frame'));
    slider.hidden = false;
    var show = function () {
      frames.forEach(function (frame, index) { frame.classList.toggle('shown', index === Number(input.value)); });
      var label = frames[Number(input.value)].dataset.label;
      output.textContent = label;
      input.setAttribute('aria-valuetext', label);
    };
    var before = frames.findIndex(function (frame) { return frame.dataset.label === state.moment; });
    if (before >= 0) { input.value = before; }
    input.addEventListener('input', function () {
      show();
      var last = Number(input.value) === frames.length - 1;
      keep('moment', last ? null : frames[Number(input.value)].dataset.label);
    });
    show();
  }

  document.querySelectorAll('svg.plot[data-lines]').forEach(function (plot) {
    var told = JSON.parse(plot.dataset.lines), first = told.lines[0], at = -1;
    if (!first || !first.x.length) { return; }
    var tip = document.createElement('div');
    tip.className = 'tip';
    tip.setAttribute('role', 'status');
    var made = function (name, attributes) {
      var element = document.createElementNS(plot.namespaceURI, name);
      Object.keys(attributes).forEach(function (key) { element.setAttribute(key, attributes[key]); });
      return element;
    };
    var marks = made('g', {'class': 'marks'});
    var nearest = function (values, x) {
      return values.reduce(function (best, value, k) {
        return Math.abs(value - x) < Math.abs(values[best] - x) ? k : best;
      }, 0);
    };
    var say = function (text, colour) {
      var line = document.createElement('div');
      if (colour) {
        var swatch = document.createElement('span');
        swatch.textContent = '\u25cf ';
        swatch.style.color = colour;
        line.appendChild(swatch);
      }
      line.appendChild(document.createTextNode(text));
      tip.appendChild(line);
    };
    var tell = function () {
      var x = first.x[at], box = plot.getBoundingClientRect(), scale = box.width / plot.viewBox.baseVal.width;
      touched = Date.now();
      marks.replaceChildren(made('path', {d: 'M' + x + ' ' + told.top + 'V' + told.bottom, stroke: 'currentColor', 'stroke-opacity': .5}));
      tip.replaceChildren();
      say(first.said[at]);
      told.lines.forEach(function (line) {
        var places = line.x || first.x, k = nearest(places, x);
        if (!places.length) { return; }
        say(line.name + ' ' + line.value[k], line.colour);
        marks.appendChild(made('circle', {cx: places.length > 1 ? places[k] : x, cy: line.y[k], r: 3.2, fill: line.colour}));
      });
      plot.appendChild(marks);
      plot.parentNode.appendChild(tip);
      var left = plot.offsetLeft || 0, room = plot.parentNode.clientWidth - tip.offsetWidth;
      tip.style.left = Math.max(0, Math.min(room, left + x * scale + 10)) + 'px';
      tip.style.top = told.top * scale + 'px';
    };
    var leave = function () {
      marks.remove();
      tip.remove();
    };
    var move = function (event) {
      var box = plot.getBoundingClientRect();
      at = nearest(first.x, (event.clientX - box.left) / box.width * plot.viewBox.baseVal.width);
      tell();
    };
    plot.addEventListener('pointermove', move);
    plot.addEventListener('pointerdown', move);
    plot.addEventListener('pointerleave', leave);
    plot.addEventListener('blur', leave);
    plot.addEventListener('keydown', function (event) {
      var by = {ArrowLeft: -1, ArrowRight: 1}[event.key];
      if (!by) { return; }
      event.preventDefault();
      at = Math.max(0, Math.min(first.x.length - 1, at < 0 ? first.x.length - 1 : at + by));
      tell();
    });
  });

  var going = document.getElementById('going');
  if (going) {
    var age = going.querySelector('.age'), news = going.querySelector('.news');
    setInterval(function () {
      var passed = Math.max(0, Date.now() / 1000 - Number(going.dataset.written));
      age.textContent = passed < 90 ? Math.round(passed) + ' s ago' : Math.round(passed / 60) + ' min ago';
      if (passed > 3600) {  // nobody writes it any more, or rarely
        news.textContent = 'It may have ended: underpaint watch says.';
      } else if (passed > 20 && !document.hidden && Date.now() - touched > 20000 && performance.now() > 20000) {
        location.reload();
      }
    }, 1000);
  }

  var opened = [];
  window.addEventListener('beforeprint', function () {
    opened = Array.from(document.querySelectorAll('details:not([open])'));
    opened.forEach(function (details) { details.open = true; });
  });
  window.addEventListener('afterprint', function () {
    opened.forEach(function (details) { details.open = false; });
  });
})();
